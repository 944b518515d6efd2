"""Offline requests give way to online ones, for as long as core/waiting says, and lose nothing but time."""

from __future__ import annotations

import dataclasses

import pytest

from tests.core.toy_rig import RECEIVER, ToyRig, expected, offer_of, submission, take
from xllm_py.core.request import Submission
from xllm_py.core.waiting import OFFLINE_S


def given(name: str, salt: int, count: int, *, offline: bool = False) -> Submission:
    prompt = [(salt * 37 + index * 5) % 300 + 1 for index in range(7)]
    made = submission(name, prompt, count, seed=salt, ignore_eos=True)
    return dataclasses.replace(made, offline=offline)


def check(rig: ToyRig, *submissions: Submission) -> None:
    for each in submissions:
        assert rig.tokens[each.request_id] == expected(each)[0]
        assert rig.ends[each.request_id] == ["length"]
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("lacks", [{"max_seqs_per_batch": 1}, {"num_blocks": 6}])
def test_an_online_request_takes_the_place_of_a_running_offline_one(lacks: dict[str, int]) -> None:
    rig = ToyRig(**lacks)  # type: ignore[arg-type]  # numbers by name
    offline = rig.add(given("f", 1, 12, offline=True))
    for _ in range(8):
        rig.step()
    online = rig.add(given("o", 2, 12))
    rig.run()
    assert list(rig.ends) == ["o", "f"]
    check(rig, offline, online)


def test_without_the_flag_it_waits() -> None:
    rig = ToyRig(max_seqs_per_batch=1, online_preempts_offline=False)
    offline = rig.add(given("f", 1, 12, offline=True))
    rig.step()
    online = rig.add(given("o", 2, 4))
    rig.run()
    assert list(rig.ends) == ["f", "o"]
    check(rig, offline, online)


def test_an_offline_request_that_waited_long_does_not_give_way_any_more() -> None:
    rig = ToyRig(max_seqs_per_batch=1)
    offline = rig.add(given("f", 1, 12, offline=True))
    rig.step()
    rig.step(seconds=OFFLINE_S + 1)
    online = rig.add(given("o", 2, 4))
    rig.run()
    assert list(rig.ends) == ["f", "o"]
    check(rig, offline, online)


def test_a_stream_of_online_requests_holds_an_offline_one_up_no_longer_than_the_rule_says() -> None:
    rig = ToyRig(max_seqs_per_batch=1)
    offline = rig.add(given("f", 1, 5, offline=True))
    began = rig.now
    for number in range(200):
        rig.add(given(f"o{number}", 2, 2))
        rig.step(seconds=1.0)
        rig.step(seconds=0.001)
        if "f" in rig.ends:
            break
    assert OFFLINE_S <= rig.now - began < OFFLINE_S + 20
    rig.run()
    check(rig, offline)


def test_nobody_gives_way_for_nothing() -> None:
    rig = ToyRig(num_blocks=6)
    online = rig.add(given("o", 2, 14))
    offline = rig.add(given("f", 1, 3, offline=True))
    rig.step()
    big = rig.add(submission("big", list(range(1, 21)), 2, ignore_eos=True))
    rig.step()
    assert rig.scheduler.ledger()["requests_running"] == 2
    rig.run()
    check(rig, online, offline, big)


@pytest.mark.parametrize("lacks", [{"max_seqs_per_batch": 2}, {"num_blocks": 8}])
def test_an_offered_online_request_is_taken_in_place_of_running_offline_ones(
    lacks: dict[str, int],
) -> None:
    giver, rig = ToyRig(), ToyRig(**lacks)  # type: ignore[arg-type]  # numbers by name
    offline = [rig.add(given(f"f{salt}", salt, 12, offline=True)) for salt in (1, 2)]
    for _ in range(7):
        rig.step()
    assert rig.scheduler.ledger()["requests_running"] == 2
    online = giver.add(dataclasses.replace(given("o", 3, 12), receiver=RECEIVER))
    giver.step()
    (giving,) = giver.scheduler.take_admitted()
    answer = rig.scheduler.reserve(offer_of(online), b"g" * 16, rig.now)
    assert not answer.refusal, answer.text
    preempted = rig.scheduler.ledger()["requests_waiting"]
    assert preempted == ("num_blocks" in lacks), "blocks are needed now, a row is not"
    first = take(giver, rig, online, answer, tuple(giving.block_ids))
    rig.tokens["o"] = giver.tokens["o"]
    assert rig.scheduler.on_first_token(first, rig.now)
    rig.step()
    rig.scheduler.on_landed("o", 1, rig.now)
    rig.step()
    assert len(rig.tokens["o"]) == 2, "it decodes in the very next step"
    assert rig.scheduler.ledger()["requests_waiting"] == 1, "one gave way, not both"
    rig.run()
    check(rig, *offline, online)


@pytest.mark.parametrize("how", ["offline", "flag", "zero_evict"])
def test_an_offer_that_may_not_take_their_place_is_refused_and_nobody_loses_anything(
    how: str,
) -> None:
    flags = {"flag": {"online_preempts_offline": False}, "zero_evict": {"zero_evict": True}}
    rig = ToyRig(num_blocks=8, **flags.get(how, {}))
    running = [rig.add(given(f"f{salt}", salt, 12, offline=True)) for salt in (1, 2)]
    for _ in range(7):
        rig.step()
    offered = dataclasses.replace(given("o", 3, 12, offline=how == "offline"), receiver=RECEIVER)
    answer = rig.scheduler.reserve(offer_of(offered), b"g" * 16, rig.now)
    assert answer.refusal == "full_now"
    rig.run()
    check(rig, *running)


def test_an_offer_that_would_not_fit_even_then_costs_nobody_anything() -> None:
    rig = ToyRig(num_blocks=9)
    online = rig.add(given("o", 1, 16))
    offline = rig.add(given("f", 2, 4, offline=True))
    rig.step()
    big = submission("big", list(range(1, 31)), 2, ignore_eos=True, give=True)
    assert rig.scheduler.reserve(offer_of(big), b"g" * 16, rig.now).refusal == "full_now"
    assert rig.scheduler.ledger()["requests_running"] == 2
    rig.run()
    check(rig, online, offline)
