"""Who is tried first, by strategy; and nobody starves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.core.toy_rig import ToyRig, submission
from xllm_py.core.journey import Moment
from xllm_py.core.request import Request, State
from xllm_py.core.waiting import OFFLINE_S, STEP_S, Waiting


def request(name: str, at: float, *, deadline: float = 1e9, **fields: Any) -> Request:
    given = dataclasses.replace(submission(name, [1], 1), **fields)
    made = Request(
        submission=given,
        state=State.WAITING,
        deadline=deadline,
        tokens=[1],
        num_prompt=1,
        num_submitted=1,
        max_len=2,
        stop_ids=frozenset(),
    )
    made.stamp(Moment.RECEIVED, at)
    return made


def order(strategy: str, *requests: Request) -> str:
    waiting = Waiting(strategy)
    for each in requests:
        waiting.add(each)
    return "".join(each.request_id for each in waiting)


def test_first_come_first_served_whatever_the_priority() -> None:
    given = [request("a", 1.0), request("b", 1.0, priority=1), request("c", 0.5)]
    assert order("fcfs", *given) == "cab"


def test_priority_goes_first_and_none_counts_as_normal() -> None:
    low, normal = request("l", 1.0, priority=3), request("n", 2.0, priority=2)
    none, high = request("0", 3.0), request("h", 4.0, priority=1)
    assert order("priority", low, normal, none, high) == "hn0l"


def test_who_has_waited_long_goes_before_a_higher_priority() -> None:
    low = request("l", 1.0, priority=3)
    late = request("h", 1.0 + 2 * STEP_S + 0.1, priority=1)
    assert order("priority", late, low) == "lh"


@pytest.mark.parametrize("strategy", ["fcfs", "priority", "deadline"])
def test_offline_requests_let_others_pass_for_a_while(strategy: str) -> None:
    offline = request("f", 1.0, deadline=100.0, offline=True)
    soon = request("o", 1.0 + OFFLINE_S - 1, deadline=100.0 + OFFLINE_S - 1)
    late = request("p", 1.0 + OFFLINE_S + 1, deadline=100.0 + OFFLINE_S + 1)
    assert order(strategy, offline, soon, late) == "ofp"


def test_the_nearest_deadline_goes_first() -> None:
    given = [request("a", 1.0, deadline=9.0), request("b", 2.0, deadline=5.0)]
    assert order("deadline", *given) == "ba"


def test_one_that_ran_already_goes_before_all_new_ones() -> None:
    waiting = Waiting("priority")
    waiting.add(request("a", 1.0, priority=1))
    back = request("b", 5.0, priority=3)
    back.num_preemptions = 1
    waiting.put_back(back)
    waiting.add(request("c", 0.0, priority=1))
    assert [each.request_id for each in waiting] == ["b", "c", "a"]


def test_the_scheduler_admits_in_that_order() -> None:
    rig = ToyRig(max_seqs_per_batch=1, priority_strategy="priority")
    rig.add(submission("first", [1, 2], 2, ignore_eos=True))
    rig.step()
    for name, priority in (("low", 3), ("high", 1), ("normal", 0)):
        given = submission(name, [1, 2, 3], 2, ignore_eos=True)
        rig.add(dataclasses.replace(given, priority=priority))
    rig.run()
    assert list(rig.ends) == ["first", "high", "normal", "low"]
    rig.scheduler.assert_empty()
