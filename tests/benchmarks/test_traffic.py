"""What benchmarks/traffic makes: repeatable requests, arrivals at a rate, and traces in three forms."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from benchmarks.traffic import SHAPES, TRACE_BLOCK, Drawn, at_rate, fixed, read_trace


def test_requests_are_repeatable_and_differ_behind_what_they_share() -> None:
    source = Drawn(fixed(10), fixed(5), seed=3, prefix_tokens=20, prefixes=2)
    asked = [source.request(number) for number in range(40)]
    assert asked == [source.request(number) for number in range(40)]
    assert asked != [Drawn(fixed(10), fixed(5), 4, 20, 2).request(number) for number in range(40)]
    assert {len(each.prompt) for each in asked} == {30}
    assert {each.output_tokens for each in asked} == {5}
    assert len({tuple(each.prompt[:20]) for each in asked}) == 2
    assert len({tuple(each.prompt[20:]) for each in asked}) == 40


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_shape_has_its_medians_and_its_ends(shape: str) -> None:
    prompt, answer = SHAPES[shape]
    asked = [Drawn(prompt, answer, seed=0).request(number) for number in range(1000)]
    for lengths, found in (
        (prompt, sorted(len(each.prompt) for each in asked)),
        (answer, sorted(each.output_tokens for each in asked)),
    ):
        assert lengths.least <= found[0]
        assert found[-1] <= lengths.most
        assert 0.9 < found[500] / lengths.median < 1.1


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 50.0])
def test_arrivals_come_at_the_rate(burstiness: float) -> None:
    source = Drawn(fixed(1), fixed(1), seed=0)
    requests = [source.request(number) for number in range(4000)]
    asked = at_rate(requests, 8.0, seed=1, burstiness=burstiness)
    gaps = [late.at_s - early.at_s for early, late in itertools.pairwise(asked)]
    assert asked[0].at_s == 0.0
    assert min(gaps) >= 0.0
    assert 0.9 < asked[-1].at_s / (4000 / 8.0) < 1.1
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.7 < variance / mean**2 * burstiness < 1.4
    assert asked == at_rate(requests, 8.0, seed=1, burstiness=burstiness)
    assert {each.at_s for each in at_rate(requests, math.inf, seed=1)} == {0.0}


def test_a_trace_of_mooncakes_shares_blocks_with_equal_ids(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"timestamp": 2500, "input_length": 1030, "output_length": 9, "hash_ids": [1, 2, 4]},
        {"input_length": 5, "output_length": 1},
        {"prompt": "why?", "output_length": 2},
        {"prompt_token_ids": [4, 5], "output_length": 3},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third, text, ids = read_trace(path)
    assert (first.at_s, second.at_s, third.at_s) == (0.0, 2.5, 0.0)
    assert list(map(len, (first.prompt, second.prompt, third.prompt))) == [1100, 1030, 5]
    shared = 2 * TRACE_BLOCK
    assert first.prompt[:shared] == second.prompt[:shared]
    assert first.prompt[shared : shared + 6] != second.prompt[shared:]
    assert (text.prompt, ids.prompt, ids.output_tokens) == ("why?", [4, 5], 3)


def test_a_list_of_conversations_gives_first_questions(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x" * 40}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    (asked,) = read_trace(path)
    assert (asked.prompt, asked.output_tokens) == ("hi", 10)


@pytest.mark.parametrize("line", ["{", "[1]x", '{"output_length": 3}', '{"prompt": "a"}', "7"])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt": "a", "output_length": 1}\n' + line + "\n")
    with pytest.raises(SystemExit, match=r"trace.jsonl: line 2 is no request"):
        read_trace(path)
