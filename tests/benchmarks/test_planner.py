"""The planner in virtual time: steps cost what the profile says, nobody waits for nothing, and the answer is the smallest split that is enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planner import main
from benchmarks.planner_sim import Costs, Plant, simulate
from benchmarks.traffic import Asked

TOKEN_S, HEAD_S, PAIR_S, KEY_S = 1e-4, 2e-4, 1e-8, 1e-7
BASE_S = 5e-3


def linears(tokens: int) -> float:
    return BASE_S + TOKEN_S * tokens


def profile() -> dict[str, object]:
    """Of a machine whose steps are a straight line."""
    sizes = (1, 2, 4, 8, 64, 256, 1024, 2048)
    prompts = [(n, 0, linears(n) + PAIR_S * n * n / 2) for n in sizes]
    prompts += [(256, c, linears(256) + PAIR_S * (256 * 128 + 256 * c)) for c in (512, 2048)]
    decodes = [(b, 128, linears(b) + HEAD_S * b + KEY_S * b * 128) for b in (1, 2, 4, 8, 64)]
    decodes += [(1, c, linears(1) + HEAD_S + KEY_S * c) for c in (512, 2048)]
    return {"prefill": prompts, "decode": decodes, "kv_bytes_per_token": 2400, "num_layers": 24}


COSTS = Costs(profile())


@pytest.mark.parametrize("chunks", [[(300, 0)], [(256, 1000)], [(700, 0), (20, 64)]])
@pytest.mark.parametrize("contexts", [[], [400], [100] * 30])
def test_a_step_takes_what_its_parts_take(
    chunks: list[tuple[int, int]], contexts: list[int]
) -> None:
    tokens = sum(n for n, _ in chunks) + len(contexts)
    pairs = sum(n * (c + n / 2) for n, c in chunks)
    wanted = linears(tokens) + PAIR_S * pairs + KEY_S * sum(contexts) + HEAD_S * len(contexts)
    assert COSTS.step(chunks, contexts) == pytest.approx(wanted, rel=0.02)


def asked(*requests: tuple[float, int, int]) -> list[Asked]:
    return [Asked(at, [0] * prompt, output) for at, prompt, output in requests]


def plant(prefills: int = 1, decodes: int = 1, **fields: float) -> Plant:
    return Plant(prefills, decodes, overhead_s=0.0, **fields)  # type: ignore[arg-type]  # by name


def test_a_lone_request_waits_for_its_steps_alone() -> None:
    (alone,) = simulate(COSTS, plant(0, 0, colocated=1), asked((1.0, 300, 4))).answers
    first = COSTS.step([(300, 0)], [])
    rest = sum(COSTS.step([], [300 + done]) for done in (1, 2, 3))
    assert alone.ttft == pytest.approx(first)
    assert alone.e2e == pytest.approx(first + rest)
    (split,) = simulate(COSTS, plant(link_bytes_s=1e6), asked((1.0, 300, 4))).answers
    assert split.ttft == pytest.approx(first)
    assert split.e2e == pytest.approx(first + rest + 300 * 100 / 1e6)


def test_decodes_never_wait_for_prompts_when_they_are_split() -> None:
    load = asked((0.0, 100, 200), *[(0.2 + 0.3 * i, 2000, 2) for i in range(4)])
    split = simulate(COSTS, plant(), load).answers[0]
    shared = simulate(COSTS, plant(0, 0, colocated=1), load).answers[0]
    chunked = simulate(COSTS, plant(0, 0, colocated=1, chunk=100), load).answers[0]
    whole = COSTS.step([(2000, 0)], [])
    assert max(split.gaps) < 2 * COSTS.step([], [300])
    assert max(shared.gaps) > whole
    assert max(split.gaps) < max(chunked.gaps) < 0.2 * max(shared.gaps)


def test_every_request_ends_with_its_tokens_whatever_the_limits() -> None:
    load = asked(*[(0.001 * i, 50 + i, 1 + i % 7) for i in range(60)])
    for fields in ({}, {"max_seqs": 2}, {"max_tokens": 64}, {"chunk": 16}):
        for prefills, decodes, colocated in ((1, 1, 0), (2, 3, 0), (0, 0, 2)):
            tried = plant(prefills, decodes, colocated=colocated, **fields)
            answers = simulate(COSTS, tried, load).answers
            assert [each.num_tokens for each in answers] == [each.output_tokens for each in load]
            assert all(gap >= 0 for each in answers for gap in each.gaps)


def test_the_answer_is_the_smallest_split_that_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(profile()))
    words = ["--profile", str(path), "--dataset", "random", "--input-len", "1000"]
    words += ["--output-len", "50", "--goodput", "ttft:600", "tpot:12", "--seconds", "30"]
    assert main([*words, "--rate", "4", "--instances", "3"]) == 0
    captured = capsys.readouterr()
    rows = {row["split"]: row for row in map(json.loads, captured.out.splitlines())}
    assert set(rows) == {
        "1 colocated",
        "2 colocated",
        "1P+1D",
        "3 colocated",
        "1P+2D",
        "2P+1D",
    }
    chosen = captured.err.split(":")[0]
    assert rows[chosen]["goodput_s"] >= 4
    assert all(
        row["goodput_s"] < 4
        for row in rows.values()
        if row["instances"] < rows[chosen]["instances"]
    )
    # prompts are nearly all of the work here, and the limit per token is tight
    assert rows["2P+1D"]["goodput_s"] > 1.5 * rows["1P+1D"]["goodput_s"]
    assert rows["1P+1D"]["goodput_s"] > rows["2 colocated"]["goodput_s"]
    assert main([*words, "--rate", "500", "--instances", "1"]) == 1
    assert "no split keeps 500" in capsys.readouterr().err


def test_a_file_that_is_no_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"steps.json is no profile"):
        Costs.read(path)
