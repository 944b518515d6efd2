"""What the scheduler does, by the text that comes out: the oracle is a lone run of the toy."""

from __future__ import annotations

import pytest

from tests.core.toy_rig import FACTS, ToyRig, expected, submission
from xllm_py.base.errors import (
    ContextLengthExceeded,
    Draining,
    InvalidValue,
    QueueFull,
    RequestError,
)
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.core.request import Submission
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.toy import EOS


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(index * 7 + salt * 13 + 1) % 300 for index in range(length)]


def check(rig: ToyRig, *given: Submission) -> None:
    """Text and ending of each equal a lone run; then everything is free."""
    for one in given:
        text, reason = expected(one)
        assert rig.tokens[one.request_id] == text
        assert rig.ends[one.request_id] == [reason]
    rig.scheduler.assert_empty()


# ---- one request ----


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_a_prompt_in_chunks_of_any_size_gives_the_text_of_a_lone_run(
    length: int, chunk: int
) -> None:
    rig = ToyRig(max_tokens_per_chunk=chunk)
    given = rig.add(submission("a", prompt(length), 9))
    rig.run()
    check(rig, given)


def test_a_prompt_is_computed_whole_when_chunks_are_off() -> None:
    rig = ToyRig(enable_chunked_prefill=False, max_tokens_per_batch=30, max_tokens_per_chunk=4)
    given = rig.add(submission("a", prompt(30), 3))
    assert rig.step().num_tokens == [30]
    rig.run()
    check(rig, given)


def test_the_step_budget_is_shared_oldest_first() -> None:
    rig = ToyRig(max_tokens_per_batch=10, max_tokens_per_chunk=8)
    given = [rig.add(submission(name, prompt(12, salt), 2)) for salt, name in enumerate("abc")]
    assert rig.step().num_tokens == [8, 2]
    assert rig.step().num_tokens == [4, 6]
    assert rig.step().num_tokens == [1, 4, 5]
    rig.run()
    check(rig, *given)


def test_a_decode_is_never_pushed_out_of_a_step_by_a_younger_prompt() -> None:
    rig = ToyRig(num_blocks=64, max_tokens_per_batch=4)
    old = rig.add(submission("old", prompt(3), 20))
    rig.step()
    young = rig.add(submission("young", prompt(40), 2))
    for _ in range(10):
        assert sorted(rig.step().num_tokens) == [1, 3]
    rig.run()
    check(rig, old, young)


def test_rows_are_a_limit_of_their_own() -> None:
    rig = ToyRig(max_seqs_per_batch=2)
    given = [rig.add(submission(name, prompt(3, salt), 4)) for salt, name in enumerate("abcd")]
    assert len(rig.step().rows) == 2
    assert rig.scheduler.ledger()["rows"] == 2
    rig.run()
    check(rig, *given)


# ---- endings ----


def test_the_end_token_ends_the_text_and_is_told() -> None:
    given = next(
        one
        for salt in range(200)
        if expected(one := submission("a", prompt(5, salt), 150))[1] == "stop"
    )
    rig = ToyRig(num_blocks=64)
    rig.add(given)
    rig.run()
    assert rig.tokens["a"][-1] == EOS
    check(rig, given)


def test_ignored_end_tokens_do_not_end_the_text() -> None:
    given = next(
        one
        for salt in range(200)
        if EOS in expected(one := submission("a", prompt(5, salt), 150, ignore_eos=True))[0][:-1]
    )
    rig = ToyRig(num_blocks=64)
    rig.add(given)
    rig.run()
    assert len(rig.tokens["a"]) == 150
    check(rig, given)


def test_a_stop_token_ends_the_text() -> None:
    text, _ = expected(submission("a", prompt(5), 9))
    rig = ToyRig()
    given = rig.add(submission("a", prompt(5), 9, stop_token_ids=(text[4],)))
    rig.run()
    assert rig.tokens["a"] == text[: text.index(text[4]) + 1]
    check(rig, given)


def test_the_model_s_length_ends_the_text() -> None:
    rig = ToyRig(num_blocks=64)
    given = rig.add(submission("a", prompt(195), 100, ignore_eos=True))
    rig.run()
    assert len(rig.tokens["a"]) == 5
    check(rig, given)


def test_one_token_is_a_whole_answer() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(5), 1))
    rig.run()
    assert rig.outputs[0].finish_reasons == ["length"]
    check(rig, given)


def test_first_and_last_entries_carry_the_journey() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(5), 3, ignore_eos=True))
    rig.run()
    first, middle, last = rig.outputs[:3]
    assert first.journeys[0].keys() == {"received", "admitted", "first_token", "decoding"}
    assert middle.journeys == {}
    assert last.journeys[0]["finished"] == pytest.approx(0.003)
    assert (first.cached_tokens, last.cached_tokens) == ({0: 0}, {0: 0})


def test_a_row_that_failed_ends_its_request_alone() -> None:
    rig = ToyRig()
    rig.add(submission("bad", prompt(5), 9))
    good = rig.add(submission("good", prompt(5, 1), 9))
    plan = rig.scheduler.schedule(rig.now)
    result = rig.executor.execute(plan)
    bad_row = plan.rows[0]
    rig.scheduler.apply(
        plan,
        StepResult(token_ids=[-1, result.token_ids[1]], failed_rows={bad_row: "not a number"}),
        rig.now,
    )
    rig.collect()
    assert rig.ends["bad"] == ["internal_error"]
    assert rig.messages["bad"] == "not a number"
    rig.run()
    check(rig, good)


def test_a_failed_row_in_the_middle_of_a_prompt_ends_its_request() -> None:
    rig = ToyRig(max_tokens_per_chunk=2)
    rig.add(submission("bad", prompt(5), 9))
    plan = rig.scheduler.schedule(rig.now)
    rig.scheduler.apply(plan, StepResult(token_ids=[], failed_rows={plan.rows[0]: "x"}), rig.now)
    rig.collect()
    assert rig.ends["bad"] == ["internal_error"]
    rig.scheduler.assert_empty()


# ---- preemption ----


def test_the_youngest_gives_way_and_its_text_is_the_same() -> None:
    rig = ToyRig(num_blocks=6)
    given = [
        rig.add(submission(name, prompt(7, salt), 14, ignore_eos=True))
        for salt, name in enumerate("abc")
    ]
    rig.run()
    check(rig, *given)
    order = [name for outputs in rig.outputs for name in outputs.request_ids]
    last = {name: len(order) - order[::-1].index(name) for name in "abc"}
    assert last["a"] < last["b"] < last["c"]


def test_seeded_text_survives_preemption() -> None:
    rig = ToyRig(num_blocks=7)
    given = [
        rig.add(submission(name, prompt(7, salt), 14, seed=salt + 1, ignore_eos=True))
        for salt, name in enumerate("abc")
    ]
    rig.run()
    check(rig, *given)


def test_the_preempted_one_waits_in_front_of_those_who_never_ran() -> None:
    rig = ToyRig(num_blocks=4, max_seqs_per_batch=2)
    given = [
        rig.add(submission(name, prompt(6, salt), 8, ignore_eos=True))
        for salt, name in enumerate("abc")
    ]
    rig.run()
    firsts = [
        name
        for outputs in rig.outputs
        for name, at in zip(outputs.request_ids, outputs.positions, strict=True)
        if at == 7
    ]
    assert firsts == ["a", "b", "c"]
    check(rig, *given)


def test_without_chunks_a_preempted_text_longer_than_a_step_goes_alone() -> None:
    rig = ToyRig(num_blocks=9, enable_chunked_prefill=False, max_tokens_per_batch=12)
    given = [
        rig.add(submission(name, prompt(10, salt), 20, ignore_eos=True))
        for salt, name in enumerate("ab")
    ]
    rig.run()
    check(rig, *given)


def test_requests_that_are_being_given_are_not_preempted() -> None:
    rig = ToyRig(num_blocks=6)
    old = rig.add(submission("old", prompt(7), 12, ignore_eos=True))
    rig.add(submission("given", prompt(15), 12, give=True, ignore_eos=True))
    for _ in range(6):
        rig.step()
    counts = rig.scheduler.ledger()
    assert counts["requests_giving"] == 1
    assert counts["active"] == 6  # the old one cannot grow and waits with what it has
    assert rig.step().empty
    rig.scheduler.on_given("given", 1, rig.now)
    rig.run()
    check(rig, old)


def test_no_new_prompt_is_admitted_above_the_usage_threshold() -> None:
    rig = ToyRig(num_blocks=10, prefill_usage_threshold=0.5)
    given = [
        rig.add(submission(name, prompt(12, salt), 2, ignore_eos=True))
        for salt, name in enumerate("ab")
    ]
    assert len(rig.step().rows) == 1  # 3 + 3 blocks of 10 would be more than half
    rig.run()
    check(rig, *given)


def test_a_prompt_above_the_threshold_is_admitted_when_it_is_alone() -> None:
    rig = ToyRig(num_blocks=10, prefill_usage_threshold=0.5)
    given = rig.add(submission("a", prompt(30), 2))
    rig.run()
    check(rig, given)


# ---- the door ----


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (submission("a", [], 2), InvalidValue),
        (submission("a", [320], 2), InvalidValue),
        (submission("a", [-1], 2), InvalidValue),
        (submission("a", [1], 2, generated=(320,)), InvalidValue),
        (submission("a", prompt(200), 2), ContextLengthExceeded),
        (submission("a", prompt(60), 10), ContextLengthExceeded),  # 70 tokens, 64 fit
        (submission("a", prompt(66), 1, give=True), ContextLengthExceeded),
        (submission("a", [1], 2, generated=(5, 6)), InvalidValue),  # nothing is left to generate
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    given: Submission, error: type[RequestError]
) -> None:
    rig = ToyRig()
    with pytest.raises(error):
        rig.add(given)
    rig.scheduler.assert_empty()


def test_an_answer_that_just_fits_is_served() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(60), 5, ignore_eos=True))  # the 65th is never computed
    rig.run()
    check(rig, given)


def test_a_request_to_be_given_needs_room_for_its_prompt_only() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(60), 100, give=True))
    rig.step()
    rig.scheduler.abort("a", 1, rig.now)
    rig.scheduler.assert_empty()


def test_without_chunks_a_prompt_longer_than_a_step_is_refused() -> None:
    rig = ToyRig(enable_chunked_prefill=False, max_tokens_per_batch=12)
    with pytest.raises(ContextLengthExceeded, match="at most 12"):
        rig.add(submission("a", prompt(13), 2))


def test_the_queue_is_bounded() -> None:
    rig = ToyRig(max_queue=2)
    rig.add(submission("a", prompt(3), 2))
    rig.add(submission("b", prompt(3), 2))
    with pytest.raises(QueueFull):
        rig.add(submission("c", prompt(3), 2))
    rig.run()
    rig.scheduler.assert_empty()


def test_a_draining_engine_takes_nothing_new_and_ends_what_it_has() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(3), 5))
    rig.scheduler.begin_drain()
    with pytest.raises(Draining):
        rig.add(submission("b", prompt(3), 2))
    rig.run()
    check(rig, given)


def test_a_refusal_goes_the_road_of_a_token() -> None:
    rig = ToyRig()
    rig.scheduler.refuse(submission("a", [1], 2), QueueFull("full"))
    rig.collect()
    assert rig.ends["a"] == ["queue_full"]
    assert rig.messages["a"] == "full"


# ---- attempts, resumption ----


def test_a_submission_that_comes_twice_runs_once() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(3), 5))
    rig.add(given)
    rig.step()
    rig.add(given)
    rig.run()
    check(rig, given)


def test_a_higher_attempt_replaces_the_lower_and_a_lower_is_passed_over() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(3), 5, attempt=2))
    rig.step()
    rig.scheduler.add(submission("a", prompt(3), 5, attempt=1), rig.now)
    assert rig.scheduler.ledger()["requests_open"] == 1
    rig.scheduler.add(submission("a", prompt(3), 5, attempt=3), rig.now)
    outputs = rig.scheduler.take_outputs()
    assert (outputs.attempts, outputs.finish_reasons) == ([2], ["abort"])
    rig.tokens["a"] = []
    rig.run()
    assert set(rig.outputs[-1].attempts) == {3}
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("logged", [1, 3, 4, 7])
def test_a_resumed_request_goes_on_where_the_log_ends(logged: int) -> None:
    whole = submission("a", prompt(6), 12, seed=5, ignore_eos=True)
    text, _ = expected(whole)
    rig = ToyRig()
    rig.add(
        submission(
            "a",
            prompt(6),
            12,
            seed=5,
            attempt=2,
            generated=tuple(text[:logged]),
            ignore_eos=True,
        )
    )
    rig.run()
    check(rig, whole)


# ---- aborts and deadlines ----


def test_an_abort_frees_everything_in_every_state() -> None:
    rig = ToyRig(max_seqs_per_batch=2, max_tokens_per_chunk=4)
    rig.add(submission("given", prompt(3), 5, give=True))
    rig.step()
    for name in ("running", "prompt", "waiting"):
        rig.add(submission(name, prompt(9), 50, ignore_eos=True))
    rig.step()
    states = {
        name: rig.scheduler.abort(name, 1, rig.now)
        for name in ("given", "running", "prompt", "waiting", "nobody")
    }
    assert states == {
        "given": "giving",
        "running": "running",
        "prompt": "running",
        "waiting": "waiting",
        "nobody": "",
    }
    rig.collect()
    assert rig.ends == {name: ["abort"] for name in ("given", "running", "prompt", "waiting")}
    rig.scheduler.assert_empty()


def test_an_abort_between_plan_and_result_frees_the_blocks_and_drops_the_token() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(3), 5))
    other = rig.add(submission("b", prompt(4), 5))
    plan = rig.scheduler.schedule(rig.now)
    result = rig.executor.execute(plan)
    rig.scheduler.abort("a", 0, rig.now)
    rig.scheduler.apply(plan, result, rig.now)
    rig.collect()
    assert rig.tokens["a"] == []
    rig.run()
    check(rig, other)


def test_an_abort_that_comes_first_kills_the_submission_when_it_arrives() -> None:
    rig = ToyRig()
    assert rig.scheduler.abort("a", 0, rig.now) == ""
    rig.clock.turn(9.0)
    rig.add(submission("a", prompt(3), 5))
    rig.collect()
    assert rig.ends["a"] == ["abort"]
    rig.scheduler.assert_empty()


def test_a_submission_that_arrives_again_after_its_abort_stays_dead() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(3), 5))
    rig.step()
    assert rig.scheduler.abort("a", 1, rig.now) == "running"
    rig.add(given)
    rig.run()
    rig.scheduler.assert_empty()
    assert len(rig.tokens["a"]) == 1


def test_tombstones_are_forgotten_after_ten_seconds_also_when_one_was_renewed() -> None:
    rig = ToyRig()
    rig.scheduler.abort("a", 1, rig.now)
    rig.scheduler.abort("b", 1, rig.now)
    rig.clock.turn(6.0)
    rig.scheduler.abort("a", 1, rig.now)
    rig.clock.turn(6.0)
    late = rig.add(submission("b", prompt(3), 5))
    rig.add(submission("a", prompt(3), 5))
    rig.run()
    assert rig.ends.pop("a") == ["abort"]
    check(rig, late)


def test_an_abort_of_another_attempt_touches_nothing() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(3), 5, attempt=2))
    assert rig.scheduler.abort("a", 1, rig.now) == ""
    rig.run()
    check(rig, given)


def test_a_deadline_ends_a_request_in_every_state() -> None:
    rig = ToyRig(max_seqs_per_batch=1)
    rig.add(submission("given", prompt(3), 5, give=True, timeout_s=5))
    rig.step()
    rig.add(submission("running", prompt(3), 50, timeout_s=6, ignore_eos=True))
    rig.add(submission("waiting", prompt(3), 9, timeout_s=7))
    rig.step()
    assert rig.scheduler.next_deadline() is not None
    rig.step(seconds=8.0)
    names = ("given", "running", "waiting")
    assert rig.ends == {name: ["deadline_exceeded"] for name in names}
    assert "deadline" in rig.messages["waiting"]
    rig.scheduler.assert_empty()
    assert rig.scheduler.next_deadline() is None


def test_events_for_unknown_requests_do_nothing() -> None:
    scheduler = Scheduler(SchedulerConfig(), FACTS, 4, 4)
    scheduler.on_landed("x", 1, 0.0)
    scheduler.on_reservation_lost("x", 1, 0.0)
    scheduler.released("x", 1)
    scheduler.on_given("x", 1, 0.0)
    scheduler.keep("x", 1, 0.0)
    scheduler.fail("x", 1, "instance_lost", "text", 0.0)
    scheduler.apply(StepPlan(step=1), StepResult(token_ids=[]), 0.0)
    assert scheduler.take_outputs().request_ids == []
    assert scheduler.schedule(0.0).empty
    scheduler.assert_empty()


# ---- to be given away ----


def test_a_request_to_be_given_tells_its_first_token_and_holds_its_blocks() -> None:
    rig = ToyRig(max_tokens_per_chunk=4)
    given = rig.add(submission("a", prompt(9), 8, give=True, ignore_eos=True))
    rig.step()
    assert [one.request_id for one in rig.scheduler.take_admitted()] == ["a"]
    assert rig.scheduler.take_admitted() == []
    rig.step()
    rig.step()
    assert rig.tokens["a"] == expected(given)[0][:1]
    assert rig.outputs[-1].finish_reasons == [""]
    assert "first_token" in rig.outputs[-1].journeys[0]
    counts = rig.scheduler.ledger()
    assert (counts["requests_giving"], counts["active"], counts["rows"]) == (1, 3, 0)
    assert not rig.scheduler.has_work()
    rig.scheduler.on_given("a", 1, rig.now)
    assert rig.collect().request_ids == []
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("when", [0, 1, 3, 5])
def test_a_request_nobody_took_goes_on_here_with_the_same_text(when: int) -> None:
    rig = ToyRig(max_tokens_per_chunk=4)
    given = rig.add(submission("a", prompt(13), 8, give=True, ignore_eos=True))
    for _ in range(when):
        rig.step()
    rig.scheduler.keep("a", 1, rig.now)
    rig.run()
    check(rig, given)


def test_a_request_this_cache_could_not_finish_is_refused_instead_of_kept() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(60), 100, give=True, ignore_eos=True))
    rig.step()
    rig.scheduler.keep("a", 1, rig.now)
    rig.collect()
    assert rig.ends["a"] == ["no_decode_capacity"]
    rig.scheduler.assert_empty()


def test_a_first_token_that_ends_the_answer_ends_it_here() -> None:
    rig = ToyRig()
    given = rig.add(submission("a", prompt(5), 1, give=True))
    rig.step()
    check(rig, given)


def test_a_kept_request_may_be_preempted_like_any_other() -> None:
    rig = ToyRig(num_blocks=6)
    old = rig.add(submission("old", prompt(7), 14, ignore_eos=True))
    young = rig.add(submission("young", prompt(7, 1), 14, give=True, ignore_eos=True))
    rig.step()
    rig.scheduler.keep("young", 1, rig.now)
    rig.scheduler.take_admitted()
    rig.run()
    assert rig.scheduler.take_admitted() == []
    check(rig, old, young)


def test_a_lost_handoff_ends_with_an_error() -> None:
    rig = ToyRig()
    rig.add(submission("a", prompt(5), 9, give=True))
    rig.step()
    rig.scheduler.fail("a", 1, "instance_lost", "the decode instance is gone", rig.now)
    rig.collect()
    assert (rig.ends["a"], rig.messages["a"]) == (["instance_lost"], "the decode instance is gone")
    rig.scheduler.assert_empty()
