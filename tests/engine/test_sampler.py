"""The sampler against the published numbers of its generator, and against slow arithmetic on plain lists."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.draws import philox, sample, uniform
from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.plan import RowStart
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.sampler import Drawn, Sampler, merged

ONES = 0xFFFFFFFF


def row(
    seed: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    min_p: float = 0.0,
    choice: int = 0,
) -> RowStart:
    return RowStart(
        row=0,
        request_id="r",
        block_ids=(),
        sampling=SamplingParams(
            max_tokens=1000,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
        ),
        choice=choice,
    )


def draws(logits: torch.Tensor, count: int, **params: float) -> list[int]:
    """Tokens of one row at `count` positions, alone each."""
    return [sample(logits[None], [row(**params)], [at])[0] for at in range(count)]  # type: ignore[arg-type]  # by name


# ---- the generator ----


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    assert philox(counter, key) == wanted


def test_a_uniform_number_is_53_bits_of_the_first_two_words_in_the_unit_interval() -> None:
    # seed 0, choice 0, position 0 is the first known answer: words 6627e8d5 and e169c58d
    assert uniform(0, 0, 0) == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) / 2**53
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert all(0 <= uniform(seed, 0, at) < 1 for at in range(50))


def test_numbers_are_spread_evenly_over_positions_choices_and_seeds() -> None:
    count, bins = 20_000, 50
    for numbers in (
        [uniform(7, 0, at) for at in range(count)],
        [uniform(7, at, 3) for at in range(count)],
        [uniform(at, 0, 3) for at in range(count)],
    ):
        found = [0] * bins
        for number in numbers:
            found[int(number * bins)] += 1
        chi = sum((have - count / bins) ** 2 / (count / bins) for have in found)
        assert chi < 110  # 49 degrees of freedom: beyond 110 once in a million
        assert len(set(numbers)) == count
        mean = sum(numbers) / count
        lagged = sum((a - mean) * (b - mean) for a, b in itertools.pairwise(numbers))
        assert abs(lagged / count * 12) < 5 / math.sqrt(
            count
        )  # neighbours tell nothing of each other


def test_every_part_of_the_name_of_a_number_counts() -> None:
    numbers = {
        uniform(seed, choice, position)
        for seed in (0, 1, 1 << 32, 1 << 62, -1)
        for choice in (0, 1, 2)
        for position in (0, 1, 2, 1 << 20)
    }
    assert len(numbers) == 5 * 3 * 4


# ---- greedy ----


def test_greedy_takes_the_highest_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-9.0, -8.0, -7.0, -7.0]])
    assert sample(logits, [row(temperature=0.0)] * 3, [0, 1, 2]) == [1, 0, 2]


def test_greedy_takes_the_lowest_id_of_equals_in_a_vocabulary_of_real_size() -> None:
    logits = torch.zeros(3, 151_936)
    for index, ids in enumerate([(151_935, 7), (70_000, 70_001), (31, 32)]):
        logits[index, list(ids)] = 4.0
    assert sample(logits, [row(temperature=0.0)] * 3, [0] * 3) == [7, 70_000, 31]


def test_greedy_does_not_look_at_seed_position_or_cuts() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    best = int(logits.argmax())
    rows = [row(seed, temperature=0.0, top_k=3, top_p=0.5, min_p=0.3) for seed in range(5)]
    assert [sample(logits, [one], [at])[0] for at, one in enumerate(rows)] == [best] * 5


def test_only_rows_of_which_nothing_else_is_asked_take_the_highest_unseen() -> None:
    sampler = Sampler(max_seqs=8, vocab_size=10)
    asked: list[dict[str, object]] = [
        {},
        {"temperature": 0.5},
        {"logprobs": 0},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),)},
        {"min_tokens": 2},
    ]
    for number, fields in enumerate(asked):
        params = SamplingParams(**{"max_tokens": 9, "temperature": 0.0, "seed": 1, **fields})  # type: ignore[arg-type]  # by name
        start = RowStart(row=number, request_id="r", block_ids=(), sampling=params)
        sampler.start(start)
    assert [sampler.is_highest(number) for number in range(len(asked))] == [True] + [False] * 5
    draws = [asked[number] == {"temperature": 0.5} for number in range(len(asked))]
    assert [sampler.only_draws(number) for number in range(len(asked))] == draws


def test_rows_that_are_chosen_alone_come_between_those_that_took_the_highest() -> None:
    said = TokenLogprob(logprob=-1.0)
    chosen = Drawn(token_ids=[7, 8, 9], logprobs={1: said, 2: said})
    found = merged([[1], [2, 2], [3, 3], [4]], [1, 3], chosen)
    assert found.token_ids == [1, 7, 8, 3, 3, 9]
    assert found.logprobs == {2: said, 5: said}
    assert merged([[1], [2, 2]], [], Drawn(token_ids=[])).token_ids == [1, 2, 2]


# ---- cuts, against plain arithmetic ----


def kept_ids(logits: list[float], params: RowStart) -> list[int]:
    """The ids that may come, by the definitions: min-p, then the top k, then the top p of what is left."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / params.sampling.temperature) for logit in logits]
    ids = [index for index, weight in enumerate(weights) if weight >= params.sampling.min_p]
    ids.sort(key=lambda index: (-weights[index], index))
    if params.sampling.top_k > 0:
        ids = ids[: params.sampling.top_k]
    total, mass, kept = sum(weights[index] for index in ids), 0.0, []
    for index in ids:
        if mass >= params.sampling.top_p * total:
            break
        kept.append(index)
        mass += weights[index]
    return sorted(kept)


def slow_token(logits: list[float], params: RowStart, position: int) -> int:
    """Walk the kept ids in id order until their mass passes the drawn share."""
    kept = kept_ids(logits, params)
    highest = max(logits)
    weights = {i: math.exp((logits[i] - highest) / params.sampling.temperature) for i in kept}
    left = uniform(params.sampling.seed, params.choice, position) * sum(weights.values())
    for index in kept:
        left -= weights[index]
        if left < 0:
            return index
    return kept[-1]


# logits on a grid: ties are common, and no two weights are so near that rounding decides
grid = st.integers(-24, 24).map(lambda number: number / 4)


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(grid, min_size=1, max_size=24),
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 2, 3, 7, 24, 1000]),
    top_p=st.sampled_from([0.037, 0.31, 0.501, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.77]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 10_000),
)
def test_a_token_is_the_one_slow_arithmetic_finds(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    params = row(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = sample(torch.tensor([logits]), [params], [position])
    assert got == [slow_token(logits, params, position)]


def test_top_k_keeps_the_lower_ids_of_equals() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert set(draws(logits, 200, top_k=2)) == {1, 2}


def test_top_p_keeps_the_token_that_crosses_the_share_and_always_one() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert set(draws(logits, 300, top_p=0.6)) == {0, 1}
    assert set(draws(logits, 300, top_p=0.4)) == {0}
    assert set(draws(logits, 100, top_p=1e-9)) == {0}


def test_min_p_is_a_share_of_the_highest_and_never_takes_it() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(draws(logits, 300, min_p=0.4)) == {1, 2}
    assert set(draws(logits, 100, min_p=1.0)) == {1}


def test_a_masked_token_never_comes() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[[3, 17, 49]] = torch.tensor([0.0, 1.0, -30.0])
    assert set(draws(logits, 300, temperature=2.0)) <= {3, 17, 49}
    assert set(draws(logits, 300)) == {3, 17}


def test_frequencies_are_the_probabilities() -> None:
    shares = torch.tensor([0.05, 0.4, 0.15, 0.1, 0.3])
    count = 5000
    for temperature in (1.0, 2.0):
        wanted = shares ** (1 / temperature)
        wanted /= wanted.sum()
        found = torch.bincount(
            torch.tensor(draws(shares.log(), count, temperature=temperature)), minlength=5
        )
        chi = float(((found - count * wanted) ** 2 / (count * wanted)).sum())
        assert chi < 33  # 4 degrees of freedom: beyond 33 once in a million


def test_the_ends_of_the_ladder_are_reached_and_not_passed() -> None:
    """A number next to 1 in a large vocabulary picks a token with weight, however the sums were rounded."""
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(1)) * 4
    logits[0, -1000:] = -torch.inf
    rows = [row(seed) for seed in range(64)]
    tokens = sample(logits.expand(64, -1), rows, [0] * 64)
    assert all(0 <= token < 151_936 - 1000 for token in tokens)
    assert len(set(tokens)) > 10


# ---- the same in any batch ----


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_gets_the_same_token_in_any_batch(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([3, 17, 320, 1000]))
    count = data.draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(count, size, generator=generator) * 3
    rows = [
        row(
            data.draw(st.integers(0, 2**63 - 1)),
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
            top_k=data.draw(st.sampled_from([-1, 1, 5])),
            top_p=data.draw(st.sampled_from([1.0, 0.6])),
            min_p=data.draw(st.sampled_from([0.0, 0.1])),
            choice=data.draw(st.integers(0, 2)),
        )
        for _ in range(count)
    ]
    positions = data.draw(st.lists(st.integers(0, 500), min_size=count, max_size=count))
    together = sample(logits, rows, positions)
    order = data.draw(st.permutations(range(count)))
    shuffled = sample(logits[order], [rows[i] for i in order], [positions[i] for i in order])
    assert shuffled == [together[i] for i in order]
    alone = [sample(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(count)]
    assert alone == together


def test_a_row_of_a_real_vocabulary_gets_the_same_token_in_any_batch_and_with_any_threads() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 151_936, generator=generator) * 2
    rows = [row(seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(9)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(sample(logits, rows, list(range(9))))
            found.append([sample(logits[i : i + 1], [rows[i]], [i])[0] for i in range(9)])
    finally:
        torch.set_num_threads(before)
    assert all(tokens == found[0] for tokens in found)


def test_sampling_does_not_change_the_logits() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    sample(logits, [row(seed, top_k=3, top_p=0.7, min_p=0.1) for seed in range(4)], [0] * 4)
    assert logits.equal(before)


def test_two_choices_of_one_request_and_two_positions_differ() -> None:
    logits = torch.zeros(1, 1000)
    tokens = [
        sample(logits, [row(9, choice=choice)], [at])[0] for choice in range(4) for at in range(4)
    ]
    assert len(set(tokens)) > 12
