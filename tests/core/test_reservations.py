"""D's half of a handoff: what is reserved, when it runs, and that nothing stays behind."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.core.toy_rig import ToyRig, expected, offer_of, submission, take
from xllm_py.core.request import FirstToken, OfferAnswer, Submission

GRANT = b"g" * 16
PROMPT = [(index * 7 + 1) % 300 for index in range(9)]


def given(count: int = 8, *, attempt: int = 1, **more: object) -> Submission:
    return submission("a", PROMPT, count, attempt=attempt, give=True, ignore_eos=True, **more)


def reserve(rig: ToyRig, one: Submission, grant: bytes = GRANT) -> OfferAnswer:
    return rig.scheduler.reserve(offer_of(one), grant, rig.now)


def first(token: int = 5, *, grant: bytes = GRANT, attempt: int = 1) -> FirstToken:
    return FirstToken(request_id="a", attempt=attempt, grant=grant, token_ids=(token,))


def computed(giver: ToyRig, one: Submission) -> tuple[int, ...]:
    """P computes the prompt; returns the blocks it lies in."""
    giver.add(one)
    giver.step()
    return tuple(giver.scheduler.take_admitted()[0].block_ids)


def test_a_grant_holds_the_blocks_of_the_prompt_and_no_row() -> None:
    rig = ToyRig()
    answer = reserve(rig, given())
    assert (answer.grant, answer.num_blocks, answer.num_held_blocks) == (GRANT, 3, 0)
    assert rig.scheduler.reserved_blocks("a") == (0, 1, 2)
    counts = rig.scheduler.ledger()
    assert (counts["staged"], counts["requests_reserved"], counts["rows"]) == (3, 1, 0)
    assert not rig.scheduler.has_work()


@pytest.mark.parametrize("landed_first", [True, False])
@pytest.mark.parametrize("seed", [0, 3])
def test_it_runs_when_landed_and_told_in_any_order_and_the_text_goes_on(
    landed_first: bool, seed: int
) -> None:
    giver, taker = ToyRig(), ToyRig(num_blocks=40)
    other = taker.add(submission("other", [3, 1, 4], 20, ignore_eos=True))
    taker.step()  # so that block numbers differ on P and D
    one = given(seed=seed)
    blocks = computed(giver, one)
    answer = reserve(taker, one)
    told = take(giver, taker, one, answer, blocks)
    taker.tokens["a"] = [*told.token_ids]
    if landed_first:
        taker.scheduler.on_landed("a", 1, taker.now)
        assert taker.scheduler.ledger()["requests_reserved"] == 1
        assert taker.scheduler.on_first_token(told, taker.now)
    else:
        assert taker.scheduler.on_first_token(told, taker.now)
        assert taker.scheduler.ledger()["requests_reserved"] == 1
        taker.scheduler.on_landed("a", 1, taker.now)
    assert taker.scheduler.ledger()["requests_running"] == 2
    taker.run()
    giver.scheduler.on_given("a", 1, giver.now)
    taker.scheduler.released("a", 1)
    assert taker.tokens["a"] == expected(one)[0]
    assert taker.tokens["other"] == expected(other)[0]
    assert taker.ends["a"] == ["length"]
    taker.scheduler.assert_empty()
    giver.scheduler.assert_empty()


def test_what_was_taken_may_be_preempted_and_keeps_its_text() -> None:
    giver, taker = ToyRig(), ToyRig(num_blocks=6)
    old = taker.add(submission("old", [3, 1, 4], 18, ignore_eos=True))
    taker.step()
    one = given(12)
    blocks = computed(giver, one)
    told = take(giver, taker, one, reserve(taker, one), blocks)
    taker.tokens["a"] = [*told.token_ids]
    taker.scheduler.on_landed("a", 1, taker.now)
    taker.scheduler.on_first_token(told, taker.now)
    taker.run()
    assert taker.tokens["a"] == expected(one)[0]
    assert taker.tokens["old"] == expected(old)[0]
    taker.scheduler.assert_empty()


def test_landed_requests_beyond_the_rows_wait_for_one() -> None:
    giver, taker = ToyRig(), ToyRig(max_seqs_per_batch=2)
    one = given()
    blocks = computed(giver, one)
    told = take(giver, taker, one, reserve(taker, one), blocks)
    taker.tokens["a"] = [*told.token_ids]
    others = [
        taker.add(submission(name, [index], 5, ignore_eos=True))
        for index, name in enumerate("xy", start=1)
    ]
    taker.step()
    taker.scheduler.on_landed("a", 1, taker.now)
    taker.scheduler.on_first_token(told, taker.now)
    assert len(taker.step().rows) == 2
    taker.run()
    assert [taker.tokens[each.request_id] for each in (one, *others)] == [
        expected(each)[0] for each in (one, *others)
    ]
    taker.scheduler.assert_empty()


def test_a_row_given_in_a_step_that_computes_nothing_is_told_later() -> None:
    giver, taker = ToyRig(), ToyRig(num_blocks=5)
    one = submission("a", PROMPT[:8], 6, give=True, ignore_eos=True)
    blocks = computed(giver, one)
    told = take(giver, taker, one, reserve(taker, one), blocks)
    other = dataclasses.replace(given(), request_id="other")
    assert reserve(taker, other, b"h" * 16).grant  # now no block is free
    taker.tokens["a"] = [*told.token_ids]
    taker.scheduler.on_landed("a", 1, taker.now)
    taker.scheduler.on_first_token(told, taker.now)
    assert taker.step().empty  # it has a row and needs a third block
    taker.scheduler.abort("other", 1, taker.now)
    taker.scheduler.released("other", 1)
    taker.run()
    assert taker.tokens["a"] == expected(one)[0]
    taker.scheduler.assert_empty()


def test_the_journey_of_a_taken_request_names_its_moments() -> None:
    rig = ToyRig()
    reserve(rig, given(2))
    rig.scheduler.on_landed("a", 1, rig.now)
    rig.scheduler.on_first_token(first(), rig.now)
    rig.tokens["a"] = [5]
    rig.step()
    journey = rig.outputs[-1].journeys[0]
    assert {"landed", "decoding", "finished"} <= journey.keys()
    rig.scheduler.assert_empty()


# ---- offers ----


def test_a_repeated_offer_gets_the_same_grant_and_a_new_expiry() -> None:
    rig = ToyRig(grant_ttl_s=10.0)
    reserve(rig, given())
    rig.clock.turn(9.0)
    assert reserve(rig, given(), b"h" * 16).grant == GRANT
    rig.step(seconds=9.0)
    assert rig.scheduler.ledger()["requests_reserved"] == 1
    rig.step(seconds=1.0)
    assert rig.scheduler.ledger()["requests_reserved"] == 0


def test_a_repeated_offer_of_a_running_request_gets_its_grant_again() -> None:
    rig = ToyRig()
    reserve(rig, given())
    rig.scheduler.on_landed("a", 1, rig.now)
    rig.scheduler.on_first_token(first(), rig.now)
    assert reserve(rig, given(), b"h" * 16).grant == GRANT


def test_an_offer_of_an_older_attempt_is_refused_under_its_own_number() -> None:
    rig = ToyRig()
    reserve(rig, given(attempt=2))
    answer = reserve(rig, given(attempt=1), b"h" * 16)
    assert (answer.attempt, answer.grant, answer.refusal) == (1, b"", "cancelled")
    assert rig.scheduler.ledger()["requests_reserved"] == 1


def test_a_late_offer_of_a_request_that_ran_here_is_refused() -> None:
    rig = ToyRig()
    reserve(rig, given(2))
    rig.scheduler.on_landed("a", 1, rig.now)
    rig.scheduler.on_first_token(first(), rig.now)
    rig.tokens["a"] = [5]
    rig.run()
    assert reserve(rig, given(2), b"h" * 16).refusal == "cancelled"
    rig.scheduler.assert_empty()


def test_a_newer_attempt_replaces_an_older_reservation() -> None:
    rig = ToyRig()
    reserve(rig, given(attempt=1))
    answer = reserve(rig, given(attempt=2), b"h" * 16)
    assert answer.grant == b"h" * 16
    assert rig.scheduler.take_ended_reservations() == [("a", 1, GRANT)]
    assert rig.scheduler.ledger()["quarantined"] == 3
    assert rig.collect().request_ids == []


def test_an_offer_of_a_request_that_was_sent_here_itself_is_refused() -> None:
    rig = ToyRig()
    rig.add(given())
    assert reserve(rig, given()).refusal == "invalid"


def test_a_resumed_offer_reserves_the_generated_tokens_too() -> None:
    rig = ToyRig()
    answer = reserve(rig, given(generated=(1, 2, 3, 4)))
    assert answer.num_blocks == len(rig.scheduler.reserved_blocks("a")) == 4


@pytest.mark.parametrize(
    ("rig", "one", "reason"),
    [
        (ToyRig(num_blocks=4), given(50), "never_fits"),
        (ToyRig(), given(timeout_s=0.0), "deadline_passed"),
        (ToyRig(), dataclasses.replace(given(), prompt_ids=(999,)), "invalid"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_with_its_reason(
    rig: ToyRig, one: Submission, reason: str
) -> None:
    answer = reserve(rig, one)
    assert (answer.refusal, answer.grant) == (reason, b"")
    assert answer.text
    rig.scheduler.assert_empty()


def test_a_draining_engine_refuses_offers() -> None:
    rig = ToyRig()
    rig.scheduler.begin_drain()
    assert reserve(rig, given()).refusal == "draining"


def test_a_full_cache_says_when_to_ask_again() -> None:
    rig = ToyRig(num_blocks=7)
    rig.add(submission("big", [1] * 19, 4, ignore_eos=True))
    rig.step()
    answer = reserve(rig, given())
    assert answer.refusal == "full_now"
    assert answer.retry_after_s > 0
    rig.run()
    assert reserve(rig, given()).grant == GRANT


def test_more_promises_than_rows_are_not_made() -> None:
    rig = ToyRig(max_seqs_per_batch=2)
    rig.add(submission("x", [1], 4))
    reserve(rig, given())
    assert reserve(rig, dataclasses.replace(given(), request_id="b")).refusal == "full_now"


def test_promises_do_not_starve_who_was_preempted() -> None:
    rig = ToyRig(num_blocks=6)
    for salt, name in enumerate("xy"):
        rig.add(submission(name, [salt] * 7, 14, ignore_eos=True))
    rig.step()
    while not rig.scheduler.ledger()["requests_waiting"]:
        rig.step()
    rig.scheduler.abort("x", 1, rig.now)
    assert reserve(rig, dataclasses.replace(given(), prompt_ids=(1,))).refusal == "full_now"
    rig.step()
    assert reserve(rig, dataclasses.replace(given(), prompt_ids=(1,))).grant == GRANT


def test_a_cancel_that_comes_before_its_offer_refuses_it() -> None:
    rig = ToyRig()
    rig.scheduler.abort("a", 1, rig.now)
    assert reserve(rig, given()).refusal == "cancelled"
    rig.scheduler.assert_empty()


# ---- first tokens ----


def test_a_first_token_under_another_grant_is_not_taken() -> None:
    rig = ToyRig()
    reserve(rig, given())
    assert not rig.scheduler.on_first_token(first(grant=b"x" * 16), rig.now)
    assert not rig.scheduler.on_first_token(first(attempt=2), rig.now)
    rig.scheduler.on_landed("a", 1, rig.now)
    assert rig.scheduler.ledger()["requests_reserved"] == 1


def test_a_first_token_outside_the_vocabulary_is_not_taken() -> None:
    rig = ToyRig()
    reserve(rig, given())
    assert not rig.scheduler.on_first_token(first(320), rig.now)
    assert not rig.scheduler.on_first_token(first(-1), rig.now)


def test_a_first_token_told_twice_is_known_while_it_runs_and_after_it_ended() -> None:
    rig = ToyRig()
    reserve(rig, given(2))
    rig.scheduler.on_landed("a", 1, rig.now)
    assert rig.scheduler.on_first_token(first(), rig.now)
    assert rig.scheduler.on_first_token(first(), rig.now)
    rig.tokens["a"] = [5]
    rig.run()
    assert rig.ends["a"] == ["length"]
    assert rig.scheduler.on_first_token(first(), rig.now)
    assert not rig.scheduler.on_first_token(first(grant=b"x" * 16), rig.now)
    rig.scheduler.assert_empty()


def test_a_first_token_of_a_reservation_that_ended_is_not_taken() -> None:
    rig = ToyRig()
    reserve(rig, given())
    rig.scheduler.abort("a", 1, rig.now)
    assert not rig.scheduler.on_first_token(first(), rig.now)


# ---- endings ----

ENDINGS = {
    "aborted": lambda rig: rig.scheduler.abort("a", 1, rig.now),
    "lost": lambda rig: rig.scheduler.on_reservation_lost("a", 1, rig.now),
    "expired": lambda rig: rig.step(seconds=30.0),
    "late": lambda rig: rig.step(seconds=21.0),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("landed", "told"),
    [pair for pair in itertools.product([False, True], repeat=2) if not all(pair)],
)
def test_a_reservation_that_ends_is_quarantined_until_released(
    ending: str, landed: bool, told: bool
) -> None:
    rig = ToyRig()
    reserve(rig, given(timeout_s=20.0 if ending == "late" else 600.0))
    if landed:
        rig.scheduler.on_landed("a", 1, rig.now)
    if told:
        rig.scheduler.on_first_token(first(), rig.now)
    ENDINGS[ending](rig)
    assert rig.scheduler.take_ended_reservations() == [("a", 1, GRANT)]
    assert rig.scheduler.take_ended_reservations() == []
    counts = rig.scheduler.ledger()
    assert (counts["quarantined"], counts["requests_open"]) == (3, 0)
    rig.scheduler.on_landed("a", 1, rig.now)
    assert not rig.scheduler.on_first_token(first(), rig.now)
    assert reserve(rig, given(), b"h" * 16).refusal == "cancelled"
    rig.scheduler.released("a", 2)
    assert rig.scheduler.ledger()["quarantined"] == 3
    rig.scheduler.released("a", 1)
    rig.scheduler.released("a", 1)
    assert rig.collect().request_ids == []  # P owns the story
    rig.scheduler.assert_empty()


def test_blocks_of_a_landed_reservation_whose_grant_is_closed_need_no_second_release() -> None:
    rig = ToyRig()
    reserve(rig, given())
    rig.scheduler.on_landed("a", 1, rig.now)
    rig.scheduler.released("a", 1)
    assert rig.scheduler.ledger()["staged"] == 3
    rig.step(seconds=30.0)
    assert rig.scheduler.take_ended_reservations() == [("a", 1, b"")]
    rig.scheduler.assert_empty()


def test_a_first_token_is_a_sign_of_life() -> None:
    rig = ToyRig(grant_ttl_s=10.0)
    reserve(rig, given())
    rig.clock.turn(9.0)
    rig.scheduler.on_first_token(first(), rig.now)
    rig.step(seconds=9.0)
    assert rig.scheduler.ledger()["requests_reserved"] == 1
    deadline = rig.scheduler.next_deadline()
    assert deadline == pytest.approx(rig.now + 1.0)


def test_blocks_that_keep_coming_are_a_sign_of_life() -> None:
    rig = ToyRig(grant_ttl_s=10.0)
    reserve(rig, given())
    for _ in range(3):
        rig.step(seconds=9.0)
        rig.scheduler.on_receiving("a", 1, rig.now)
    assert rig.scheduler.ledger()["requests_reserved"] == 1
    rig.scheduler.on_receiving("a", 2, rig.now)
    rig.step(seconds=10.0)
    assert rig.scheduler.ledger()["requests_reserved"] == 0
    rig.scheduler.on_receiving("a", 1, rig.now)
    rig.scheduler.released("a", 1)
    rig.scheduler.assert_empty()


def test_a_running_request_is_no_reservation_any_more() -> None:
    rig = ToyRig()
    reserve(rig, given())
    rig.scheduler.on_landed("a", 1, rig.now)
    rig.scheduler.on_first_token(first(), rig.now)
    rig.scheduler.on_reservation_lost("a", 1, rig.now)
    rig.scheduler.released("a", 1)
    assert rig.scheduler.ledger()["requests_running"] == 1
    assert rig.scheduler.abort("a", 1, rig.now) == "running"
    assert rig.collect().finish_reasons == ["abort"]
    rig.scheduler.assert_empty()
