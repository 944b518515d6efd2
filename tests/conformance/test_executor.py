"""One suite for every executor: the toy, and one rank over a small random checkpoint in both dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.executor import Executor
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor
from xllm_py.engine.toy import ToyExecutor

BLOCK_SIZE = 4
NUM_BLOCKS = 64
PROMPT = [(index * 37 + 11) % 300 for index in range(23)]
OTHER = [(index * 53 + 5) % 300 for index in range(9)]
COUNT = 6

Make = Callable[[], Executor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp(dtype)
        made[dtype] = make_checkpoint(
            folder, seed=3, dtype=dtype, heads=6, kv_heads=3, layers=3, hidden_size=48
        )
    return made


@pytest.fixture(params=["toy", "float32", "bfloat16"])
def make(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Make]:
    made: list[Executor] = []

    def build() -> Executor:
        if request.param == "toy":
            config = EngineConfig(
                toy_num_blocks=NUM_BLOCKS, cache=CacheConfig(block_size=BLOCK_SIZE)
            )
            made.append(ToyExecutor(config))
        else:
            config = EngineConfig(
                model_path=str(folders[request.param]),
                cpu_threads=1,
                cache=CacheConfig(block_size=BLOCK_SIZE, max_cache_bytes=1 << 20),
                scheduler=SchedulerConfig(max_seqs_per_batch=8),
            )
            made.append(open_executor(config))
        return made[-1]

    yield build
    for executor in made:
        executor.close()
        executor.close()  # idempotent


class Row:
    """One sequence in one batch row: its known tokens, its blocks, and how far it is computed."""

    def __init__(
        self, prompt: Sequence[int], blocks: Sequence[int], *, row: int = 0, **sampling: Any
    ) -> None:
        fields = {"max_tokens": 1000, "temperature": 0.0, "seed": 0}
        choice = sampling.pop("choice", 0)
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.row = row
        self.started = False
        self.start = RowStart(
            row=row,
            request_id=f"r{row}",
            block_ids=tuple(blocks),
            sampling=SamplingParams(**{**fields, **sampling}),
            choice=choice,
        )

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.num_prompt :]


def step(executor: Executor, *parts: tuple[Row, int], number: int = 1, **plan: Any) -> list[int]:
    """Compute so many tokens of each row; rows that caught up sample, and keep the token."""
    whole = [row.num_computed + count == len(row.tokens) for row, count in parts]
    result = executor.execute(
        StepPlan(
            step=number,
            started=tuple(row.start for row, _ in parts if not row.started),
            rows=[row.row for row, _ in parts],
            num_tokens=[count for _, count in parts],
            num_computed=[row.num_computed for row, _ in parts],
            token_ids=[
                token
                for row, count in parts
                for token in row.tokens[row.num_computed : row.num_computed + count]
            ],
            sample=[int(done) for done in whole],
            positions=[len(row.tokens) - row.num_prompt for row, _ in parts],
            **plan,
        )
    )
    assert not result.failed_rows
    assert len(result.token_ids) == sum(whole)
    tokens = iter(result.token_ids)
    for (row, count), sampled in zip(parts, whole, strict=True):
        row.started = True
        row.num_computed += count
        if sampled:
            row.tokens.append(next(tokens))
    return result.token_ids


def answer(executor: Executor, row: Row, *, chunk: int = 1000, count: int = COUNT) -> list[int]:
    """Alone, in chunks, to so many tokens."""
    while len(row.answer) < count:
        step(executor, (row, min(chunk, len(row.tokens) - row.num_computed)))
    return row.answer


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 22])
def test_a_prompt_in_chunks_gives_the_answer_of_the_whole_prompt(make: Make, chunk: int) -> None:
    executor = make()
    whole = answer(executor, Row(PROMPT, range(8)))
    assert answer(executor, Row(PROMPT, range(8, 16)), chunk=chunk) == whole


def test_an_unfinished_chunk_gives_no_token(make: Make) -> None:
    executor = make()
    long, short = Row(PROMPT, range(8)), Row(OTHER, range(8, 16), row=1)
    assert len(step(executor, (long, 5), (short, len(OTHER)))) == 1
    assert long.answer == []
    assert len(short.answer) == 1


def test_the_answer_is_the_same_in_any_blocks_row_and_company(make: Make) -> None:
    executor = make()
    alone = answer(executor, Row(PROMPT, range(8)))
    other = answer(executor, Row(OTHER, range(8, 16)))
    first = Row(PROMPT, [40, 3, 39, 5, 60, 1, 30, 2], row=5)
    second = Row(OTHER, [63, 7, 21, 22], row=2)
    third = Row(PROMPT[:5], [50, 51, 52], row=7)
    step(executor, (first, 10), (second, 4))
    step(executor, (second, 5), (third, 5), (first, 13))
    while len(first.answer) < COUNT:
        step(executor, (third, 1), (first, 1), (second, 1))
    assert first.answer == alone
    assert second.answer[:COUNT] == other[: len(second.answer)]


def test_a_row_grows_block_by_block(make: Make) -> None:
    executor = make()
    wanted = answer(executor, Row(PROMPT, range(16)), count=12)
    free = [55, 20, 41, 33, 7]
    row = Row(PROMPT, [60, 50, 40, 30, 10, 1])
    step(executor, (row, len(PROMPT)))
    for number in range(2, 13):
        have = row.num_computed
        grown = have % BLOCK_SIZE == 0
        more = {"grown_rows": [0], "grown_blocks": [free.pop()]} if grown else {}
        step(executor, (row, 1), number=number, **more)
    assert row.answer == wanted


def test_a_new_owner_of_a_row_and_of_its_blocks_sees_nothing_of_the_last_one(make: Make) -> None:
    executor = make()
    fresh = answer(executor, Row(OTHER, range(20, 28)))
    answer(executor, Row(PROMPT, range(8), temperature=1.0, seed=5), count=9)
    assert answer(executor, Row(OTHER, range(8))) == fresh


def test_the_blocks_of_one_executor_are_continued_by_another(make: Make) -> None:
    """What a handoff moves is all that an answer depends on."""
    giver, taker = make(), make()
    whole = answer(giver, Row(PROMPT, range(8)))
    given = Row(PROMPT, [9, 33, 17, 21, 12, 30, 8, 11])
    step(giver, (given, len(PROMPT)))
    source, target = giver.kv_memory(), taker.kv_memory()
    assert source.layout.fingerprint == target.layout.fingerprint
    there = [2, 4, 6, 8, 10, 12, 14, 16]
    for layer in range(source.layout.num_layers):
        for part in range(2):
            for here, to in zip(given.start.block_ids[:6], there, strict=False):
                target.span(layer, part, to)[:] = source.span(layer, part, here)
    taken = Row(PROMPT, there, row=3)
    taken.tokens, taken.num_computed = list(given.tokens), given.num_computed
    assert answer(taker, taken) == whole


def test_lost_blocks_change_the_answer(make: Make) -> None:
    executor = make()
    row = Row(PROMPT, range(8))
    whole = list(answer(executor, row))
    memory = executor.kv_memory()
    for layer in range(memory.layout.num_layers):
        for part in range(2):
            span = memory.span(layer, part, 0, 5)
            span[:] = bytes(span.nbytes)
    again = Row([*PROMPT, *whole[:1]], range(8))
    again.num_prompt, again.num_computed = len(PROMPT), len(PROMPT)
    assert answer(executor, again) != whole


def test_layers_are_told_in_ascending_order_and_are_complete_then(make: Make) -> None:
    executor = make()
    memory = executor.kv_memory()
    told: list[tuple[int, list[bytes]]] = []

    def content(layer: int) -> list[bytes]:
        return [bytes(memory.span(layer, part, 0, 6)) for part in range(2)]

    plan = StepPlan(
        step=1,
        started=(Row(PROMPT, range(6)).start,),
        rows=[0],
        num_tokens=[len(PROMPT)],
        num_computed=[0],
        token_ids=PROMPT,
        sample=[1],
        positions=[0],
    )
    executor.execute(plan, lambda layer: told.append((layer, content(layer))))
    layers = range(memory.layout.num_layers)
    assert told == [(layer, content(layer)) for layer in layers]
    assert all(any(part) for _, parts in told for part in parts)


def test_a_seed_gives_its_own_answer_and_gives_it_again(make: Make) -> None:
    executor = make()

    def seeded(seed: int, blocks: range) -> list[int]:
        return answer(executor, Row(PROMPT, blocks, temperature=1.0, seed=seed), count=8)

    answers = [seeded(seed, range(8)) for seed in (1, 2, 3)]
    assert len({tuple(text) for text in answers}) == 3
    assert seeded(2, range(16, 24)) == answers[1]


def test_draws_from_one_computation_are_what_each_choice_draws_alone(make: Make) -> None:
    executor = make()
    alone = [
        answer(executor, Row(PROMPT, range(8), temperature=1.0, seed=5, choice=choice), count=1)
        for choice in range(4)
    ]
    row = Row(PROMPT, range(8), temperature=1.0, seed=5)
    neighbour = Row(PROMPT, range(8, 16), row=1)
    plan = StepPlan(
        step=1,
        started=(row.start, neighbour.start),
        rows=[0, 1],
        num_tokens=[len(PROMPT)] * 2,
        num_computed=[0, 0],
        token_ids=PROMPT * 2,
        sample=[4, 1],
        positions=[0, 0],
    )
    drawn = executor.execute(plan).token_ids
    assert [[token] for token in drawn[:4]] == alone
    assert drawn[4:] == answer(executor, Row(PROMPT, range(8)), count=1)


def test_a_copied_block_serves_as_its_source_does(make: Make) -> None:
    executor = make()
    row = Row(PROMPT, range(8))
    whole = list(answer(executor, row))
    last = len(PROMPT) // BLOCK_SIZE  # the block that the answer goes on in
    copied = Row([*PROMPT, whole[0]], [*range(last), 20, *range(21, 28)])
    copied.num_prompt, copied.num_computed = len(PROMPT), len(PROMPT)
    token = step(executor, (copied, 1), copied_from=[last], copied_to=[20])[0]
    assert [token, *answer(executor, copied)[2:]] == whole[1:]


def test_capacity_and_memory_agree(make: Make) -> None:
    executor = make()
    capacity, memory = executor.capacity(), executor.kv_memory()
    assert capacity.num_blocks == memory.num_blocks >= NUM_BLOCKS
    assert capacity.block_size == memory.layout.block_size == BLOCK_SIZE
    assert capacity.max_seqs >= 8
    assert capacity.facts.max_model_len > 100
    assert all(0 <= token < capacity.facts.vocab_size for token in capacity.facts.eos_token_ids)
    assert capacity.summary
    other = make().capacity()
    assert other.model_fingerprint == capacity.model_fingerprint
    assert other.numerics_fingerprint == capacity.numerics_fingerprint != "approximate"


def test_tokens_lie_inside_the_vocabulary(make: Make) -> None:
    executor = make()
    size = executor.capacity().facts.vocab_size
    tokens = answer(executor, Row(PROMPT, range(16), temperature=2.0, seed=8), count=30)
    assert all(0 <= token < size for token in tokens)
    assert len(set(tokens)) > 5
