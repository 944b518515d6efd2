"""Prefixes that were computed before are not computed again, and the text stays what it would have been."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.toy_rig import ToyRig, expected, offer_of, submission, take
from xllm_py.core.block_manager import BlockManager, Holding
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import OfferAnswer, Submission

ROOT = b"root" * 4
PROMPT = [(7 * n + 3) % 300 for n in range(40)]


def cached_rig(**fields: int) -> ToyRig:
    return ToyRig(prefix_root=ROOT, **fields)


def run_one(rig: ToyRig, one: Submission) -> list[StepPlan]:
    """Serve it alone; its text must be the lone one. Returns the plans."""
    rig.add(one)
    plans = []
    while rig.scheduler.has_work():
        plans.append(rig.step())
    assert rig.tokens[one.request_id] == expected(one)[0]
    return plans


def cached_tokens(rig: ToyRig) -> int:
    """Of the request that ended last."""
    told = [count for each in rig.outputs for count in each.cached_tokens.values()]
    return told[-1]


def ask(name: str, prompt: list[int], count: int = 5) -> Submission:
    return submission(name, prompt, count, ignore_eos=True)


def test_a_prompt_seen_before_is_computed_from_its_first_new_block_on() -> None:
    rig = cached_rig()
    run_one(rig, ask("a", PROMPT[:18]))
    first, *_ = run_one(rig, ask("b", [*PROMPT[:10], 299, 298, 297]))
    assert (first.num_computed, first.num_tokens) == ([8], [5])
    assert cached_tokens(rig) == 8
    rig.scheduler.assert_empty()


@pytest.mark.parametrize(("length", "hit"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_one_token_of_a_repeated_prompt_is_computed_at_least(length: int, hit: int) -> None:
    rig = cached_rig()
    run_one(rig, ask("a", PROMPT[:length]))
    first, *_ = run_one(rig, ask("b", PROMPT[:length]))
    assert first.num_computed == [hit]


def test_the_answer_of_one_turn_is_the_prefix_of_the_next() -> None:
    rig = cached_rig()
    run_one(rig, ask("a", PROMPT[:6], 9))
    talk = [*PROMPT[:6], *rig.tokens["a"], 5, 6]
    first, *_ = run_one(rig, ask("b", talk))
    assert first.num_computed == [12]  # 14 tokens were computed, the last one said never was


def test_other_salts_share_nothing() -> None:
    rig = cached_rig()
    for name, salt, hit in (("a", "one", 0), ("b", "two", 0), ("c", "one", 8), ("d", "", 0)):
        one = dataclasses.replace(ask(name, PROMPT[:12]), cache_salt=salt)
        first, *_ = run_one(rig, one)
        assert first.num_computed == [hit]


def test_an_offer_of_another_salt_finds_nothing_at_d() -> None:
    giver, taker = ToyRig(), cached_rig()
    hand_over(giver, taker, given_away("a", PROMPT[:12]), b"1" * 16)
    taker.run()
    salted = dataclasses.replace(given_away("b", PROMPT[:12]), cache_salt="other")
    assert hand_over(giver, taker, salted, b"2" * 16).num_held_blocks == 0
    taker.run()
    assert taker.tokens["b"] == expected(salted)[0]


def test_without_a_root_nothing_is_kept() -> None:
    rig = ToyRig()
    run_one(rig, ask("a", PROMPT[:12]))
    first, *_ = run_one(rig, ask("b", PROMPT[:12]))
    assert first.num_computed == [0]
    assert rig.scheduler.ledger()["cached"] == 0


def test_what_is_cached_costs_no_budget() -> None:
    rig = cached_rig(max_tokens_per_batch=8)
    run_one(rig, ask("a", PROMPT[:33], 1))
    first, *_ = run_one(rig, ask("b", [*PROMPT[:32], 1, 2, 3, 4, 5], 1))
    assert (first.num_computed, first.num_tokens, first.sample) == ([32], [5], [True])


def test_two_that_run_share_the_blocks_of_their_prefix() -> None:
    rig = cached_rig()
    rig.add(ask("a", PROMPT[:12], 20))
    rig.step()
    rig.add(ask("b", [*PROMPT[:12], 1], 20))
    rig.step()
    assert rig.scheduler.ledger()["active"] == 4 + 1  # three are shared
    rig.run()
    for name, prompt in (("a", PROMPT[:12]), ("b", [*PROMPT[:12], 1])):
        assert rig.tokens[name] == expected(ask(name, prompt, 20))[0]
    rig.scheduler.assert_empty()


def test_the_least_recently_used_prefix_makes_room_its_end_first() -> None:
    rig = cached_rig(num_blocks=8)
    run_one(rig, ask("a", PROMPT[:12], 1))
    run_one(rig, ask("b", [*range(100, 112)], 1))
    assert rig.scheduler.ledger()["cached"] == 6
    run_one(rig, ask("c", [*range(200, 213)], 1))  # four blocks, of which two are free
    assert rig.scheduler.ledger()["prefix_evicted_blocks"] == 2
    first, *_ = run_one(rig, ask("d", PROMPT[:12], 1))
    assert first.num_computed == [4]


def test_a_prefix_in_use_is_never_evicted() -> None:
    rig = cached_rig(num_blocks=6)
    rig.add(ask("a", PROMPT[:8], 9))
    rig.step()
    for number in range(4):
        rig.add(ask(str(number), [200 + number] * 5, 2))
    rig.run()
    assert rig.tokens["a"] == expected(ask("a", PROMPT[:8], 9))[0]
    rig.scheduler.assert_empty()


def test_equal_hashes_of_other_tokens_are_no_hit() -> None:
    blocks = BlockManager(4, 2)
    (block,) = blocks.allocate(1)
    blocks.publish(block, b"h", (1, 2))
    assert blocks.match([b"h"], [1, 2]) == [block]
    assert blocks.match([b"h"], [1, 3]) == []


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    rig = cached_rig(num_blocks=8)
    asked = [ask("a", PROMPT[:9], 12), ask("b", [*range(50, 59)], 12)]
    for one in asked:
        rig.add(one)
    rig.run()
    for one in asked:
        assert rig.tokens[one.request_id] == expected(one)[0]
    assert (
        rig.scheduler.ledger()["prefix_queried_tokens"] == 18
    )  # the second admission counts as none
    rig.scheduler.assert_empty()


# ---- D ----


def given_away(name: str, prompt: list[int], count: int = 6) -> Submission:
    return submission(name, prompt, count, give=True, ignore_eos=True)


def reserve(rig: ToyRig, one: Submission, grant: bytes) -> OfferAnswer:
    return rig.scheduler.reserve(offer_of(one), grant, rig.now)


def hand_over(giver: ToyRig, taker: ToyRig, one: Submission, grant: bytes) -> OfferAnswer:
    """The whole handoff of one request, as it should go."""
    giver.add(one)
    giver.step()
    (request,) = giver.scheduler.take_admitted()
    answer = reserve(taker, one, grant)
    taker.tokens[one.request_id] = list(giver.tokens[one.request_id])
    first = take(giver, taker, one, answer, tuple(request.block_ids))
    taker.scheduler.on_landed(one.request_id, 1, taker.now)
    assert taker.scheduler.on_first_token(first, taker.now)
    taker.scheduler.released(one.request_id, 1)
    giver.scheduler.on_given(one.request_id, 1, giver.now)
    return answer


def test_d_answers_with_what_it_holds_and_runs_on_it() -> None:
    giver, taker = ToyRig(), cached_rig()
    one, two = given_away("a", PROMPT[:18]), given_away("b", [*PROMPT[:13], 9, 9])
    assert hand_over(giver, taker, one, b"1" * 16).num_held_blocks == 0
    taker.run()
    answer = hand_over(giver, taker, two, b"2" * 16)
    assert (answer.num_held_blocks, answer.num_blocks) == (3, 4)
    taker.run()
    for each in (one, two):
        assert taker.tokens[each.request_id] == expected(each)[0]
    giver.scheduler.assert_empty()
    taker.scheduler.assert_empty()


def test_a_prompt_that_d_holds_whole_needs_no_block() -> None:
    giver, taker = ToyRig(), cached_rig()
    hand_over(giver, taker, given_away("a", PROMPT[:12]), b"1" * 16)
    taker.run()
    again = given_away("b", PROMPT[:12])
    answer = hand_over(giver, taker, again, b"2" * 16)
    assert (answer.num_held_blocks, answer.num_blocks) == (3, 3)
    taker.run()
    assert taker.tokens["b"] == expected(again)[0]


def test_an_ended_reservation_lets_go_of_what_it_shared_and_quarantines_the_rest() -> None:
    giver, taker = ToyRig(), cached_rig(num_blocks=8)
    hand_over(giver, taker, given_away("a", PROMPT[:12]), b"1" * 16)
    taker.run()
    two = given_away("b", [*PROMPT[:12], *range(8)])
    assert reserve(taker, two, b"2" * 16).num_held_blocks == 3
    assert taker.scheduler.ledger()["staged"] == 5
    taker.scheduler.on_reservation_lost("b", 1, taker.now)
    counts = taker.scheduler.ledger()
    assert (counts["cached"], counts["quarantined"]) == (
        4,
        2,
    )  # one more holds a part of the answer
    taker.scheduler.released("b", 1)
    taker.scheduler.assert_empty()


def test_what_d_holds_counts_as_room_for_an_offer() -> None:
    giver, taker = ToyRig(), cached_rig(num_blocks=6)
    hand_over(
        giver, taker, given_away("a", PROMPT[:12], 8), b"1" * 16
    )  # runs on, with five blocks at last
    taker.step()
    assert reserve(taker, given_away("b", [*PROMPT[:12], 1], 4), b"2" * 16).num_held_blocks == 3
    other = given_away("c", [*range(13)], 4)
    assert reserve(taker, other, b"3" * 16).refusal == "full_now"


def test_a_block_has_many_holders_and_one_state() -> None:
    blocks = BlockManager(4, 2)
    mine = blocks.allocate(1)
    blocks.publish(mine[0], b"h", (1, 2))
    blocks.acquire(mine, Holding.STAGED)
    assert blocks.counts()["active"] == 1
    blocks.free(mine)
    assert blocks.counts()["staged"] == 1
    blocks.acquire(mine)
    blocks.move(mine, Holding.STAGED, Holding.ACTIVE)
    blocks.free(mine)
    blocks.free(mine)
    assert (blocks.counts()["cached"], blocks.num_free) == (1, 4)
    with pytest.raises(ValueError, match="CACHED, not ACTIVE"):
        blocks.free(mine)
    other = blocks.allocate(4)
    assert blocks.match([b"h"], [1, 2]) == []
    with pytest.raises(ValueError, match="cannot be shared"):
        blocks.acquire(other)


families = st.lists(
    st.tuples(
        st.integers(0, 30),  # arrives at this step
        st.integers(0, 2),  # which text it begins with
        st.integers(0, 14),  # so much of it
        st.integers(0, 6),  # tokens of its own behind it
        st.integers(1, 12),  # answer
        st.one_of(st.none(), st.none(), st.integers(0, 20)),  # aborted so many steps later
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    asked=families,
    chunk=st.sampled_from([2, 4, 100]),
    num_blocks=st.sampled_from([9, 14, 40]),
)
def test_requests_with_common_prefixes_say_what_they_would_say_alone(
    asked: list[tuple[int, int, int, int, int, int | None]], chunk: int, num_blocks: int
) -> None:
    rig = cached_rig(num_blocks=num_blocks, max_tokens_per_chunk=chunk)
    submitted = {}
    for turn in range(55):
        for number, (at, text, shared, own, count, leaves) in enumerate(asked):
            name = str(number)
            if at == turn:
                base = [(11 * n + 17 * text) % 300 for n in range(shared)]
                prompt = [*base, *[(number * 31 + n) % 300 for n in range(own)]] or [1]
                submitted[name] = rig.add(ask(name, prompt, count))
            if leaves is not None and at + leaves == turn:
                rig.scheduler.abort(name, 1, rig.now)
        rig.step()
    rig.run()
    for name, one in submitted.items():
        text, reason = expected(one)
        said = rig.tokens[name]
        assert said == text[: len(said)]
        assert rig.ends[name] in (["abort"], [reason])
        assert (rig.ends[name] == [reason]) == (len(said) == len(text)) or rig.ends[name] == [
            "abort"
        ]
    rig.scheduler.assert_empty()


def test_a_later_attempt_finds_what_an_earlier_one_computed() -> None:
    rig = cached_rig()
    one = ask("a", PROMPT[:20], 6)
    rig.add(one)
    rig.step()
    again = dataclasses.replace(one, attempt=2, generated_ids=tuple(rig.tokens["a"]))
    rig.add(again)
    plan = rig.step()
    assert plan.num_computed == [20]


def test_requests_of_one_batch_share_what_the_first_of_them_computes() -> None:
    rig = ToyRig(num_blocks=60, prefix_root=b"root", max_tokens_per_chunk=8)
    shared = list(range(1, 17))
    given = [
        rig.add(submission(f"r{index}", [*shared, 100 + index], 3, ignore_eos=True))
        for index in range(4)
    ]
    computed = 0
    while rig.scheduler.has_work():
        computed += len(rig.step().token_ids)
    assert computed == len(shared) + 4 * (1 + 2)
    for one in given:
        assert rig.tokens[one.request_id] == expected(one)[0]
    rig.scheduler.assert_empty()


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_gone() -> None:
    rig = ToyRig(num_blocks=60, prefix_root=b"root", max_tokens_per_chunk=4)
    shared = list(range(1, 17))
    rig.add(submission("owner", [*shared, 99], 3, ignore_eos=True))
    waiter = rig.add(submission("waiter", [*shared, 98], 3, ignore_eos=True))
    other = rig.add(submission("other", [7, 7, 7], 3, ignore_eos=True))
    plan = rig.step()
    assert len(plan.rows) == 2  # the owner and the one that shares nothing
    rig.scheduler.abort("owner", 1, rig.now)
    rig.run()
    assert rig.tokens["waiter"] == expected(waiter)[0]
    assert rig.tokens["other"] == expected(other)[0]
    rig.scheduler.assert_empty()
