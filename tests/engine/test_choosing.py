"""What a request changes in its draws, against plain arithmetic: penalties, bias, min_tokens, choices, log probabilities."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.engine.draws import sample, uniform
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor
from xllm_py.engine.sampler import Drawn, Sampler
from xllm_py.engine.uniforms import uniforms

SIZE = 40


def start(
    row: int = 0,
    *,
    prompt: tuple[int, ...] = (),
    said: tuple[int, ...] = (),
    stops: frozenset[int] = frozenset(),
    choice: int = 0,
    **fields: Any,
) -> RowStart:
    params = {"max_tokens": 100, "seed": 3, "temperature": 0.0, **fields}
    return RowStart(
        row=row,
        request_id=f"r{row}",
        block_ids=(),
        sampling=SamplingParams(**params),
        stop_ids=stops,
        choice=choice,
        prompt_ids=prompt,
        generated_ids=said,
    )


def sampler_of(*starts: RowStart, mode: str = "raw", size: int = SIZE) -> Sampler:
    sampler = Sampler(max_seqs=len(starts), vocab_size=size, logprobs_mode=mode)
    for each in starts:
        sampler.start(each)
    return sampler


def one(sampler: Sampler, logits: torch.Tensor, position: int = 0, draws: int = 1) -> Drawn:
    return sampler.choose(logits[None], [0], [position], [draws])


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


# ---- edits ----


def edited(logits: list[float], row: RowStart, position: int) -> list[float]:
    """By the definitions, one token after the other, in float32."""
    params, values = row.sampling, torch.tensor(logits)
    for token in range(len(logits)):
        count = row.generated_ids.count(token)
        if count or token in row.prompt_ids:
            rate = torch.tensor(params.repetition_penalty)
            values[token] = values[token] / rate if values[token] > 0 else values[token] * rate
        values[token] -= torch.tensor(params.frequency_penalty) * count
        values[token] -= params.presence_penalty if count else 0.0
        values[token] += sum(bias for other, bias in params.logit_bias if other == token)
        if token in row.stop_ids and position < params.min_tokens:
            values[token] = -math.inf
    found: list[float] = values.tolist()
    return found


def random_start(rng: random.Random, row: int) -> RowStart:
    ids = [rng.randrange(SIZE) for _ in range(rng.randrange(12))]
    bias = {rng.randrange(SIZE + 9): rng.uniform(-5, 5) for _ in range(rng.randrange(4))}
    return start(
        row,
        prompt=tuple(ids[:5]),
        said=tuple(ids[5:]),
        stops=frozenset({rng.randrange(SIZE), SIZE + 7}),
        choice=rng.randrange(3),
        seed=rng.randrange(-(2**63), 2**63),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 0.6]),
        top_k=rng.choice([-1, 4]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 0.5, 1.7]),
        frequency_penalty=rng.choice([0.0, 1.5, -1.0]),
        presence_penalty=rng.choice([0.0, 2.0, -0.5]),
        logit_bias=tuple(bias.items()),
        min_tokens=rng.choice([0, 5]),
        logprobs=rng.choice([-1, 0, 3]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_mixed_batch_says_what_each_row_says_alone_by_plain_arithmetic(seed: int) -> None:
    rng = random.Random(seed)
    rows = [random_start(rng, row) for row in range(9)]
    logits = noise(seed, 9, SIZE)
    before = logits.clone()
    positions = [rng.randrange(10) for _ in rows]
    together = sampler_of(*rows).choose(logits, range(9), positions, [1] * 9)
    assert logits.equal(before)
    for index, row in enumerate(rows):
        changed = torch.tensor([edited(logits[index].tolist(), row, positions[index])])
        plain = dataclasses.replace(
            row,
            sampling=dataclasses.replace(
                row.sampling,
                repetition_penalty=1.0,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                logit_bias=(),
                min_tokens=0,
            ),
        )
        assert [together.token_ids[index]] == sample(changed, [plain], [positions[index]])
        lone = one(sampler_of(dataclasses.replace(row, row=0)), logits[index], positions[index])
        assert lone.token_ids == [together.token_ids[index]]
        assert lone.logprobs.get(0) == together.logprobs.get(index)


def test_a_row_notes_what_it_said_and_its_next_owner_knows_nothing_of_it() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 0.0])
    row = start(frequency_penalty=1.5)
    sampler = sampler_of(row, size=4)
    said = [one(sampler, logits, at).token_ids[0] for at in range(6)]
    assert said == [0, 1, 0, 2, 1, 0]
    sampler.start(row)
    assert one(sampler, logits).token_ids == [0]
    told = sampler_of(dataclasses.replace(row, generated_ids=tuple(said[:3])), size=4)
    assert [one(told, logits, at).token_ids[0] for at in (3, 4, 5)] == said[3:]


def test_no_stop_token_comes_before_min_tokens_whatever_its_bias() -> None:
    logits = torch.zeros(SIZE)
    row = start(stops=frozenset({7, SIZE + 1}), min_tokens=3, logit_bias=((7, 100.0),))
    sampler = sampler_of(row)
    assert [one(sampler, logits, at).token_ids[0] for at in range(5)] == [0, 0, 0, 7, 7]


# ---- choices ----


def test_draws_of_one_row_are_the_choices_after_it() -> None:
    logits = noise(1, 2, SIZE)
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
    rows = [start(0, prompt=(1, 2), choice=2, **params), start(1, prompt=(9,), **params)]
    both = sampler_of(*rows).choose(logits, [0, 1], [4, 6], [5, 1]).token_ids
    for draw in range(5):
        lone = sampler_of(dataclasses.replace(rows[0], choice=2 + draw))
        assert one(lone, logits[0], 4).token_ids == [both[draw]]
    assert both[5:] == sampler_of(*rows).choose(logits[1:], [1], [6], [1]).token_ids
    assert len(set(both[:5])) > 1


def test_numbers_made_together_are_those_made_one_by_one() -> None:
    rng = random.Random(5)
    names = [
        (rng.randrange(-(2**63), 2**63), rng.randrange(128), rng.randrange(2**33))
        for _ in range(500)
    ]
    columns = torch.tensor(names).T.numpy()
    assert uniforms(*columns).tolist() == [uniform(*name) for name in names]


# ---- log probabilities ----


@pytest.mark.parametrize("size", [SIZE, 50_257])
def test_log_probabilities_are_the_log_softmax_and_the_likeliest_come_first(size: int) -> None:
    logits = noise(2, size)
    row = start(temperature=1.3, top_k=5, logprobs=6, logit_bias=((3, 9.0),))
    drawn = one(sampler_of(row, size=size), logits)
    wanted, found = torch.log_softmax(logits, -1), drawn.logprobs[0]
    assert found.logprob == pytest.approx(float(wanted[drawn.token_ids[0]]), abs=1e-5)
    assert found.top_ids == tuple(wanted.topk(6).indices.tolist())
    assert found.top_logprobs == pytest.approx(wanted.topk(6).values.tolist(), abs=1e-5)


def test_the_lower_ids_of_equals_are_named_first() -> None:
    logits = torch.zeros(SIZE)
    logits[30] = 1.0
    assert one(sampler_of(start(logprobs=4)), logits).logprobs[0].top_ids == (30, 0, 1, 2)


def test_more_of_the_likeliest_than_there_are_tokens_are_all_of_them() -> None:
    found = one(sampler_of(start(logprobs=2000)), noise(3, SIZE)).logprobs[0]
    assert sorted(found.top_ids) == list(range(SIZE))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_processed_ones_are_of_what_could_be_drawn(temperature: float) -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    row = start(temperature=temperature, top_k=2, logprobs=4, logit_bias=((0, -100.0),))
    drawn = one(sampler_of(row, mode="processed", size=4), logits)
    kept = torch.tensor(
        [-97.0, 2.0, 1.0, 0.0] if not temperature else [-math.inf, 4.0, 2.0, -math.inf]
    )
    wanted = torch.log_softmax(kept, -1)
    found = drawn.logprobs[0]
    assert found.top_ids == ((1, 2, 3, 0) if not temperature else (1, 2))
    assert found.top_logprobs == pytest.approx([float(wanted[i]) for i in found.top_ids], abs=1e-5)
    assert found.logprob == pytest.approx(float(wanted[drawn.token_ids[0]]), abs=1e-5)


def test_log_probabilities_have_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    size = 50_257
    logits = noise(4, 9, size)
    rows = [start(row, temperature=row % 2, seed=row, logprobs=5) for row in range(9)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sampler = sampler_of(*rows, size=size)
            found.append(sampler.choose(logits, range(9), [0] * 9, [1] * 9).logprobs)
            lone = [sampler.choose(logits[i : i + 1], [i], [0], [1]).logprobs[0] for i in range(9)]
            found.append(dict(enumerate(lone)))
    finally:
        torch.set_num_threads(before)
    assert all(each == found[0] for each in found)


# ---- of a prompt, through the worker ----


def judged(folder: Path, pieces: list[int]) -> list[Any]:
    """All targets of a prompt of 300 tokens that is computed in these pieces, beside another row."""
    cache = CacheConfig(block_size=16, max_cache_bytes=4 << 20)
    executor = open_executor(EngineConfig(model_path=str(folder), cpu_threads=1, cache=cache))
    ids = [7 * i % 300 for i in range(300)]
    rows = (
        RowStart(
            row=0,
            request_id="a",
            block_ids=tuple(range(19)),
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=3),
        ),
        dataclasses.replace(start(1), block_ids=(20, 21)),
    )
    found: list[Any] = []
    computed = 0
    for step, count in enumerate(pieces):
        end = computed + count
        result = executor.execute(
            StepPlan(
                step=step,
                started=rows if not step else (),
                rows=[1, 0],
                num_tokens=[1, count],
                num_computed=[step, computed],
                token_ids=[5, *ids[computed:end]],
                sample=[1, int(end == len(ids))],
                positions=[step, 0],
                targets={1: ids[computed + 1 : end + 1]},
            )
        )
        assert not result.failed_rows
        found += result.prompt_logprobs[1]
        computed = end
    executor.close()
    return found


def test_a_prompt_is_judged_alike_whole_and_in_chunks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=True)
    whole = judged(folder, [300])
    assert len(whole) == 299
    assert all(len(each.top_ids) == 3 for each in whole)
    assert all(each.top_logprobs[0] >= each.logprob for each in whole)
    assert judged(folder, [1, 31, 100, 168]) == whole
