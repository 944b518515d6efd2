"""The columns of the decodes: what the rig checks after every step, where it matters most."""

from __future__ import annotations

from tests.core.toy_rig import ToyRig, submission
from xllm_py.core.plan import StepPlan, StepResult

PROMPT = [5, 6, 7]


def _decoding(rig: ToyRig) -> list[str]:
    return [request.request_id for request in rig.scheduler._batch._decodes.requests]


def mid_step() -> tuple[ToyRig, StepPlan, StepResult]:
    """Three decode; a step of theirs is computed and not taken in."""
    rig = ToyRig(num_blocks=40)
    for name in "abc":
        rig.add(submission(name, PROMPT, 8, ignore_eos=True))
    for _ in range(3):
        rig.step()
    plan = rig.scheduler.schedule(rig.now)
    return rig, plan, rig.executor.execute(plan)


def test_requests_join_the_decodes_with_their_second_token_and_leave_with_their_last() -> None:
    rig = ToyRig(num_blocks=40)
    for name, length in (("a", 3), ("b", 9), ("c", 5)):
        rig.add(submission(name, PROMPT, length, ignore_eos=True))
    rig.step()
    assert _decoding(rig) == []
    rig.step()
    assert _decoding(rig) == ["a", "b", "c"]
    rig.step()
    assert _decoding(rig) == ["c", "b"]  # the last one took the place of the first
    rig.run()
    rig.scheduler.assert_empty()


def test_one_that_ends_between_plan_and_result_takes_nobodys_token_with_it() -> None:
    rig, plan, result = mid_step()
    rig.scheduler.abort("a", 0, rig.now)
    assert _decoding(rig) == []  # the columns are not those of the plan any more
    rig.scheduler.apply(plan, result, rig.now)
    rig.collect()
    assert _decoding(rig) == ["b", "c"]
    rig.run()
    assert rig.ends == {"a": ["abort"], "b": ["length"], "c": ["length"]}
    assert rig.tokens["b"] == rig.tokens["c"] and len(rig.tokens["b"]) == 8
    assert rig.tokens["a"] == rig.tokens["b"][:3]


def test_a_row_that_fails_fails_alone() -> None:
    rig, plan, result = mid_step()
    tokens = list(result.token_ids)
    tokens[1] = -1
    failed = StepResult(token_ids=tokens, failed_rows={plan.rows[1]: "its logits are not finite"})
    rig.scheduler.apply(plan, failed, rig.now)
    rig.collect()
    assert _decoding(rig) == ["a", "c"]
    rig.run()
    assert rig.ends == {"a": ["length"], "b": ["internal_error"], "c": ["length"]}
    assert rig.tokens["a"] == rig.tokens["c"] and len(rig.tokens["a"]) == 8


def test_one_that_asks_for_log_probabilities_stays_among_the_others() -> None:
    rig = ToyRig(num_blocks=40)
    rig.add(submission("a", PROMPT, 6, ignore_eos=True))
    rig.add(submission("b", PROMPT, 6, ignore_eos=True, logprobs=1))
    for _ in range(3):
        rig.step()
    assert _decoding(rig) == ["a"]
    rig.run()
    told = sum(len(outputs.logprobs) for outputs in rig.outputs)
    assert told == len(rig.tokens["b"])


def test_with_fewer_tokens_a_step_than_requests_the_oldest_decode_first() -> None:
    rig = ToyRig(num_blocks=60, max_tokens_per_batch=3, max_tokens_per_chunk=3)
    for name in "abcde":
        rig.add(submission(name, PROMPT, 6, ignore_eos=True))
    rig.run()
    assert {name: len(tokens) for name, tokens in rig.tokens.items()} == dict.fromkeys("abcde", 6)
