from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.toy import EOS, VOCAB_SIZE, Lone, ToyExecutor, lone_answer, lone_run

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


def alone(**sampling: Any) -> Lone:
    fields: dict[str, Any] = {"max_tokens": 12, "seed": 3, "temperature": 0.0, **sampling}
    return lone_run(make(), PROMPT, SamplingParams(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": ((5, 1.0),)},
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.5},
        {"temperature": 1.0, "seed": 4},
    ],
    ids=str,
)
def test_each_parameter_gives_its_own_text(fields: dict[str, Any]) -> None:
    said = alone(**fields).token_ids
    assert said == alone(**fields).token_ids
    assert said != alone().token_ids
    assert said != alone(temperature=fields.get("temperature", 0.0) + 0.25).token_ids


def history_step(known: list[int], start: RowStart) -> list[int]:
    """The next token of a row that begins again behind `known`."""
    plan = StepPlan(
        step=1,
        started=(start,),
        rows=[0],
        num_tokens=[len(known)],
        num_computed=[0],
        token_ids=known,
        sample=[1],
        positions=[len(known) - len(PROMPT)],
    )
    return make().execute(plan).token_ids


def test_a_row_that_begins_again_goes_on_and_one_with_a_stale_history_does_not() -> None:
    sampling = SamplingParams(max_tokens=12, seed=3, temperature=0.0, frequency_penalty=0.5)
    said = lone_run(make(), PROMPT, sampling).token_ids
    begun = RowStart(
        row=0,
        request_id="again",
        block_ids=(0, 1, 2),
        sampling=sampling,
        prompt_ids=tuple(PROMPT),
        generated_ids=tuple(said[:4]),
    )
    known = [*PROMPT, *said[:4]]
    assert history_step(known, begun) == said[4:5]
    stale = dataclasses.replace(begun, generated_ids=tuple(said[:3]))
    assert history_step(known, stale) != said[4:5]
    untold = dataclasses.replace(begun, prompt_ids=())
    assert history_step(known, untold) != said[4:5]


def test_no_stop_token_before_min_tokens_and_the_same_text_otherwise() -> None:
    plain = alone().token_ids
    held = alone(min_tokens=5, stop_token_ids=(plain[2], (plain[2] + 1) % VOCAB_SIZE))
    assert held.token_ids[:2] == plain[:2]
    assert held.token_ids[2] == (plain[2] + 2) % VOCAB_SIZE
    late = alone(min_tokens=2, stop_token_ids=(plain[2],))
    assert late.token_ids == plain


def test_logprobs_go_with_the_tokens_and_the_greedy_token_leads() -> None:
    said = alone(logprobs=3)
    assert said.token_ids == alone().token_ids
    assert [each.top_ids[0] for each in said.logprobs] == said.token_ids
    assert [each.top_logprobs[0] for each in said.logprobs] == [
        each.logprob for each in said.logprobs
    ]
    assert len({each.logprob for each in said.logprobs}) > 6
    for each in said.logprobs:
        assert list(each.top_logprobs) == sorted(each.top_logprobs, reverse=True)
    drawn = alone(logprobs=0, temperature=1.0)
    assert all(not each.top_ids and each.logprob <= 0 for each in drawn.logprobs)
    assert len(drawn.logprobs) == 12


def test_the_logprobs_of_a_prompt_are_the_same_in_chunks_and_depend_on_all_before() -> None:
    whole = alone(prompt_logprobs=2).prompt_logprobs
    assert len(whole) == len(PROMPT) - 1
    executor, found = make(), []
    sampling = SamplingParams(max_tokens=1, seed=3, prompt_logprobs=2)
    row = RowStart(row=0, request_id="a", block_ids=(4, 2), sampling=sampling)
    for first in range(0, len(PROMPT), 3):
        fresh = PROMPT[first : first + 3]
        plan = StepPlan(
            step=1,
            started=() if first else (row,),
            rows=[0],
            num_tokens=[len(fresh)],
            num_computed=[first],
            token_ids=fresh,
            sample=[0],
            positions=[0],
            targets={0: PROMPT[first + 1 : first + 4]},
        )
        found += executor.execute(plan).prompt_logprobs[0]
    assert found == whole
    other = SamplingParams(max_tokens=1, seed=3, prompt_logprobs=2)
    changed = lone_run(make(), [1, *PROMPT[1:]], other).prompt_logprobs
    assert all(one != two for one, two in zip(changed, whole, strict=True))


def test_a_row_with_a_grammar_fails_alone() -> None:
    bound = SamplingParams(max_tokens=1, seed=0, temperature=0.0, grammar="{}")
    executor = make()
    plan = StepPlan(
        step=1,
        started=(
            start((0, 1)),
            dataclasses.replace(start((2, 3), row=1), sampling=bound),
        ),
        rows=[1, 0],
        num_tokens=[7, 7],
        num_computed=[0, 0],
        token_ids=[*PROMPT, *PROMPT],
        sample=[1, 1],
        positions=[0, 0],
    )
    result = executor.execute(plan)
    assert list(result.failed_rows) == [1]
    assert "grammar" in result.failed_rows[1]
    assert result.token_ids == [-1, *lone_answer(make(), PROMPT, 1)]
