from __future__ import annotations

import pytest

from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.toy import EOS, VOCAB_SIZE, ToyExecutor, lone_answer

PROMPT = [7, 8, 9, 10, 11, 12, 13]


def make(num_blocks: int = 16, block_size: int = 4) -> ToyExecutor:
    return ToyExecutor(
        EngineConfig(toy_num_blocks=num_blocks, cache=CacheConfig(block_size=block_size))
    )


def start(blocks: tuple[int, ...], *, row: int = 0, seed: int = 0) -> RowStart:
    return RowStart(
        row=row,
        request_id=f"row {row}",
        block_ids=blocks,
        sampling=SamplingParams(max_tokens=1, temperature=1.0 if seed else 0.0, seed=seed),
    )


def prompt_plan(blocks: tuple[int, ...], ids: list[int] = PROMPT, first: int = 0) -> StepPlan:
    """Compute ids[first:], where ids[:first] are in the cache already."""
    return StepPlan(
        step=1,
        started=(start(blocks),),
        rows=[0],
        num_tokens=[len(ids) - first],
        num_computed=[first],
        token_ids=ids[first:],
        sample=[1],
        positions=[0],
    )


def first_token(executor: ToyExecutor, blocks: tuple[int, ...], ids: list[int] = PROMPT) -> int:
    return executor.execute(prompt_plan(blocks, ids)).token_ids[0]


def test_the_same_prompt_in_other_blocks_gives_the_same_token() -> None:
    assert first_token(make(), (0, 1)) == first_token(make(), (9, 3))


def test_every_token_of_the_context_counts() -> None:
    base = first_token(make(), (0, 1))
    others = [
        first_token(make(), (0, 1), [*PROMPT[:index], 99, *PROMPT[index + 1 :]])
        for index in range(len(PROMPT))
    ]
    assert base not in others


def test_a_prompt_in_chunks_gives_the_token_of_the_whole_prompt() -> None:
    whole = first_token(make(), (0, 1))
    executor = make()
    chunk = StepPlan(
        step=1,
        started=(start((5, 2)),),
        rows=[0],
        num_tokens=[3],
        num_computed=[0],
        token_ids=PROMPT[:3],
        sample=[0],
        positions=[0],
    )
    assert executor.execute(chunk).token_ids == []
    rest = StepPlan(
        step=2,
        rows=[0],
        num_tokens=[4],
        num_computed=[3],
        token_ids=PROMPT[3:],
        sample=[1],
        positions=[0],
    )
    assert executor.execute(rest).token_ids == [whole]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("block", [0, 1])
def test_a_byte_lost_in_any_layer_part_or_block_changes_the_token(
    layer: int, part: int, block: int
) -> None:
    whole = first_token(make(), (0, 1), [*PROMPT, 5])
    executor = make()
    executor.execute(prompt_plan((0, 1)))
    executor.kv_memory().span(layer, part, block)[0] ^= 1
    assert executor.execute(prompt_plan((0, 1), [*PROMPT, 5], first=7)).token_ids != [whole]


def test_blocks_read_in_the_wrong_order_change_the_token() -> None:
    executor = make()
    ids = [*PROMPT, 3, 4]
    whole = executor.execute(prompt_plan((0, 1, 2), ids)).token_ids
    swapped = StepPlan(
        step=2,
        started=(start((1, 0, 2)),),
        rows=[0],
        num_tokens=[1],
        num_computed=[8],
        token_ids=[4],
        sample=[1],
        positions=[0],
    )
    assert executor.execute(swapped).token_ids != whole


def test_a_new_owner_of_a_row_sees_nothing_of_the_last_one() -> None:
    executor = make()
    executor.execute(prompt_plan((0, 1), [1, 2, 3, 4, 5, 6]))
    assert first_token(executor, (0, 1)) == first_token(make(), (0, 1))


def test_a_grown_row_writes_into_its_new_block() -> None:
    executor = make()
    ids = list(range(4))
    token = first_token(executor, (3,), ids)
    grown = StepPlan(
        step=2,
        grown_rows=[0],
        grown_blocks=[9],
        rows=[0],
        num_tokens=[1],
        num_computed=[4],
        token_ids=[token],
        sample=[1],
        positions=[1],
    )
    assert executor.execute(grown).token_ids == lone_answer(make(), ids, 2)[1:]


def test_a_seed_gives_its_own_text_and_gives_it_again() -> None:
    texts = [lone_answer(make(), PROMPT, 20, seed=seed) for seed in (0, 1, 2)]
    assert len({tuple(text) for text in texts}) == 3
    assert lone_answer(make(), PROMPT, 20, seed=1) == texts[1]


def test_layers_are_told_in_ascending_order_and_are_complete_then() -> None:
    executor = make()
    told = []

    def layer_done(layer: int) -> None:
        told.append((layer, bytes(executor.kv_memory().span(layer, 1, 0))))

    executor.execute(prompt_plan((0, 1)), layer_done)
    assert [layer for layer, _ in told] == [0, 1]
    assert told == [(layer, bytes(executor.kv_memory().span(layer, 1, 0))) for layer in (0, 1)]
    assert all(any(content) for _, content in told)


def test_capacity_says_what_the_scheduler_needs() -> None:
    capacity = make(num_blocks=9, block_size=8).capacity()
    assert (capacity.num_blocks, capacity.block_size) == (9, 8)
    assert capacity.facts.vocab_size == VOCAB_SIZE
    assert capacity.facts.eos_token_ids == (EOS,)


def test_tokens_lie_inside_the_vocabulary_and_use_much_of_it() -> None:
    answer = lone_answer(make(num_blocks=80), PROMPT, 300)
    assert all(0 <= token < VOCAB_SIZE for token in answer)
    assert len(set(answer)) > 100
