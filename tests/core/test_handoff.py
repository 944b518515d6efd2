"""The giver's machine, event by event; every interleaving of it with a taker is in test_handoff_walk."""

from __future__ import annotations

import itertools

import pytest

from xllm_py.base.errors import IllegalTransition
from xllm_py.core.handoff import (
    CLOSED,
    FIRST_TRIES,
    OFFER_TOTAL_S,
    TRANSITIONS,
    UNREACHABLE,
    CancelPeer,
    Commit,
    Connect,
    Fail,
    FreeBlocks,
    Giver,
    GiverState,
    Keep,
    Push,
    SendFirst,
    SendOffer,
    Verdict,
)
from xllm_py.core.request import OfferAnswer

NOW = 50.0


def make(*, local_decode: bool = True, deadline: float = 1e9, jitter: float = 0.0) -> Giver:
    giver = Giver(now=NOW, deadline=deadline, local_decode=local_decode, jitter=jitter)
    assert giver.start() == [SendOffer()]
    return giver


def granted(held: int = 0) -> OfferAnswer:
    return OfferAnswer(
        request_id="r", attempt=1, grant=b"g" * 16, num_held_blocks=held, num_blocks=3
    )


def refused(reason: str, retry_after_s: float = 0.0) -> OfferAnswer:
    return OfferAnswer(
        request_id="r", attempt=1, refusal=reason, text="why", retry_after_s=retry_after_s
    )


def committed(*, local_decode: bool = True) -> Giver:
    giver = make(local_decode=local_decode)
    giver.on_answer(granted(), NOW)
    giver.on_computed(3, True)
    assert giver.state is GiverState.COMMITTED
    return giver


# ---- the good road ----


def test_blocks_are_pushed_as_they_are_computed_and_committed_with_the_first_token() -> None:
    giver = make()
    assert giver.on_answer(granted(), NOW) == [Connect(granted())]
    assert giver.on_computed(1, False) == [Push(0, 1)]
    assert giver.on_computed(1, False) == []
    assert giver.on_computed(3, True) == [Push(1, 2), Commit(), SendFirst()]
    assert giver.on_first_delivered(True, True, NOW) == []
    assert giver.on_acknowledged() == [FreeBlocks(), Verdict("landed")]
    assert giver.closed


def test_blocks_are_freed_only_when_landed_and_told_in_any_order() -> None:
    giver = committed()
    assert giver.on_acknowledged() == []
    assert giver.on_first_delivered(True, True, NOW) == [FreeBlocks(), Verdict("landed")]


def test_a_grant_that_comes_after_the_prompt_is_done_pushes_everything_then() -> None:
    giver = make()
    assert giver.on_computed(3, True) == []
    assert giver.on_answer(granted(), NOW) == [Connect(granted())]
    assert giver.on_computed(3, True) == [Push(0, 3), Commit(), SendFirst()]


def test_what_was_claimed_for_a_step_is_not_pushed_again_after_it() -> None:
    giver = make()
    assert giver.claim(2) == (0, 0)  # not granted yet
    giver.on_answer(granted(), NOW)
    assert giver.claim(2) == (0, 2)
    assert giver.claim(2) == (2, 0)
    assert giver.on_computed(2, False) == []
    assert giver.claim(3) == (2, 1)
    assert giver.on_computed(3, True) == [Commit(), SendFirst()]


def test_blocks_the_taker_holds_already_are_not_pushed() -> None:
    giver = make()
    giver.on_answer(granted(held=2), NOW)
    assert giver.on_computed(1, False) == []
    assert giver.on_computed(3, True) == [Push(2, 1), Commit(), SendFirst()]


def test_a_taker_that_holds_all_blocks_gets_only_the_commit() -> None:
    giver = make()
    giver.on_computed(3, True)
    assert giver.on_answer(granted(held=3), NOW) == [
        Connect(granted(held=3)),
        Commit(),
        SendFirst(),
    ]


# ---- refusals ----


def test_a_full_taker_is_asked_again_with_growing_pauses_for_two_seconds() -> None:
    giver = make()
    now, asked_at = NOW, [NOW]
    while not (actions := giver.on_answer(refused("full_now"), now)):
        assert giver.next_tick is not None
        assert giver.on_tick(giver.next_tick - 0.001) == []
        now = giver.next_tick
        assert giver.on_tick(now) == [SendOffer()]
        asked_at.append(now)
    pauses = [round(b - a, 6) for a, b in itertools.pairwise(asked_at)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert now - NOW < OFFER_TOTAL_S
    assert actions == [Keep(), Verdict("refused", "full_now")]
    assert giver.next_tick is None


def test_pauses_are_spread_by_the_jitter_and_not_shorter_than_asked_for() -> None:
    giver = make(jitter=0.5)
    giver.on_answer(refused("full_now", retry_after_s=0.4), NOW)
    assert giver.next_tick == pytest.approx(NOW + 0.6)


def test_a_full_taker_is_not_asked_again_past_the_deadline() -> None:
    giver = make(deadline=NOW + 0.04)
    assert giver.on_answer(refused("full_now"), NOW) == [Keep(), Verdict("refused", "full_now")]


@pytest.mark.parametrize("reason", ["not_linked", "stale_incarnation"])
def test_an_unlinked_pair_is_tried_once_more(reason: str) -> None:
    giver = make()
    assert giver.on_answer(refused(reason), NOW) == []
    assert giver.on_tick(NOW) == [SendOffer()]
    assert giver.on_answer(refused(reason), NOW) == [Keep(), Verdict("refused", reason)]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("never_fits", "context_length_exceeded"),
        ("draining", "draining"),
        ("best_of_needs_prefix_cache", "best_of_requires_prefix_cache"),
        ("layout_differs", "no_compatible_decode"),
        ("model_differs", "no_compatible_decode"),
        ("deadline_passed", "deadline_exceeded"),
        ("invalid", "internal_error"),
        ("cancelled", "no_decode_capacity"),
    ],
)
def test_other_refusals_end_the_offer_at_once(reason: str, code: str) -> None:
    assert make().on_answer(refused(reason), NOW) == [Keep(), Verdict("refused", reason)]
    giver = make(local_decode=False)
    assert giver.on_answer(refused(reason), NOW) == [Fail(code, "why"), Verdict("refused", reason)]
    assert giver.state is GiverState.FAILED


def test_an_offer_without_an_answer_is_cancelled_for_it_may_have_arrived() -> None:
    giver = make()
    actions = giver.on_answer(refused("unreachable"), NOW)
    assert actions == [CancelPeer(), Keep(), Verdict("refused", "unreachable")]


def test_no_answer_and_no_decode_here_is_an_instance_lost() -> None:
    actions = make(local_decode=False).on_answer(refused("unreachable"), NOW)
    assert actions[1] == Fail("instance_lost", UNREACHABLE)


def test_an_answer_nobody_waits_for_is_passed_over() -> None:
    giver = committed()
    assert giver.on_answer(granted(), NOW) == []
    assert giver.on_answer(refused("draining"), NOW) == []


# ---- failures ----


def test_a_link_that_fails_before_the_commit_leaves_the_request_here() -> None:
    giver = make()
    giver.on_answer(granted(), NOW)
    giver.on_computed(1, False)
    assert giver.on_link_failed("cut") == [CancelPeer(), Keep(), Verdict("lost", "cut")]
    assert giver.on_computed(3, True) == []


def test_a_link_that_fails_before_the_commit_fails_the_request_when_nobody_may_decode_here() -> (
    None
):
    giver = make(local_decode=False)
    giver.on_answer(granted(), NOW)
    assert giver.on_link_failed("cut") == [
        CancelPeer(),
        Fail("instance_lost", UNREACHABLE),
        Verdict("lost", "cut"),
    ]


@pytest.mark.parametrize("local_decode", [True, False])
def test_a_link_that_fails_after_the_commit_loses_the_attempt(local_decode: bool) -> None:
    giver = committed(local_decode=local_decode)
    cancel, fail, verdict = giver.on_link_failed("cut")
    assert (cancel, verdict) == (CancelPeer(), Verdict("lost", "cut"))
    assert isinstance(fail, Fail)
    assert fail.code == "instance_lost"


def test_a_link_that_fails_after_the_acknowledgement_is_of_no_interest() -> None:
    giver = committed()
    giver.on_acknowledged()
    assert giver.on_link_failed("cut") == []
    assert giver.on_first_delivered(True, True, NOW) == [FreeBlocks(), Verdict("landed")]


def test_the_first_token_is_told_three_times_with_pauses_and_then_the_attempt_is_lost() -> None:
    giver = committed()
    now = NOW
    for _ in range(FIRST_TRIES - 1):
        assert giver.on_first_delivered(False, False, now) == []
        assert giver.next_tick is not None
        assert giver.next_tick > now
        now = giver.next_tick
        assert giver.on_tick(now) == [SendFirst()]
    verdict = giver.on_first_delivered(False, False, now)[-1]
    assert verdict == Verdict("lost", "first token not delivered")


def test_a_taker_that_does_not_know_the_grant_loses_the_attempt_at_once() -> None:
    giver = committed()
    giver.on_acknowledged()
    assert giver.on_first_delivered(False, True, NOW)[-1] == Verdict("lost", "grant unknown")


def test_a_repeated_word_on_the_first_token_changes_nothing() -> None:
    giver = committed()
    giver.on_first_delivered(True, True, NOW)
    assert giver.on_first_delivered(False, True, NOW) == []
    assert giver.on_first_delivered(False, False, NOW) == []
    assert giver.next_tick is None


# ---- the request ends on P ----


@pytest.mark.parametrize(("complete", "kind"), [(True, "finished_on_p"), (False, "cancelled")])
def test_a_request_that_ends_here_cancels_the_grant(complete: bool, kind: str) -> None:
    waiting = make()
    waiting.on_answer(refused("full_now"), NOW)
    pushing = make()
    pushing.on_answer(granted(), NOW)
    for giver in (make(), waiting, pushing, committed()):
        assert giver.on_ended(complete) == [CancelPeer(), Verdict(kind)]
        assert giver.state is GiverState.CANCELLED
        assert giver.next_tick is None


def closed_givers() -> list[Giver]:
    done = committed()
    done.on_acknowledged()
    done.on_first_delivered(True, True, NOW)
    kept, failed, lost, cancelled = make(), make(local_decode=False), committed(), make()
    kept.on_answer(refused("draining"), NOW)
    failed.on_answer(refused("draining"), NOW)
    lost.on_link_failed("cut")
    cancelled.on_ended(False)
    return [done, kept, failed, lost, cancelled]


def test_a_closed_handoff_says_nothing_more_whatever_comes() -> None:
    givers = closed_givers()
    assert {giver.state for giver in givers} == CLOSED
    for giver in givers:
        assert giver.on_answer(granted(), NOW) == []
        assert giver.on_computed(3, True) == []
        assert giver.claim(3)[1] == 0
        assert giver.on_acknowledged() == []
        assert giver.on_link_failed("cut") == []
        assert giver.on_first_delivered(True, True, NOW) == []
        assert giver.on_ended(True) == []
        assert giver.on_tick(NOW + 100) == []


def test_what_is_not_in_the_table_names_the_machine_and_both_states() -> None:
    giver = closed_givers()[0]
    with pytest.raises(
        IllegalTransition, match="giver: event pushing is not allowed in state done"
    ):
        giver._move(GiverState.PUSHING)


def test_no_road_leads_out_of_a_closed_state() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] in CLOSED]
