"""Requests held back while nobody has time for them."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.master.support import running_master, submission, until
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import DeadlineExceeded, QueueFull, QueueTimeout
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Role
from xllm_py.core.request import Submission
from xllm_py.master.waiting_room import HELD_S, WaitingRoom

NEVER = 1e9


class Busy:
    """A waiting room whose instances have time for as many as the test says."""

    def __init__(self, *, most_waiting: int = 100, patience_s: float = 60.0) -> None:
        self.free = 0
        self.through: list[str] = []
        self.clock = RealClock()
        self.room = WaitingRoom(
            most_waiting=most_waiting,
            patience_s=patience_s,
            soonest_s=lambda model: 0.0 if self.free else HELD_S + 1,
            tasks=TaskFamily("room"),
            clock=self.clock,
            metrics=Metrics(),
        )

    async def enter(self, order: Submission, deadline_s: float = NEVER) -> None:
        await self.room.pass_through(order, self.clock.now() + deadline_s)
        self.free -= 1
        self.through.append(order.request_id)


async def test_who_finds_time_does_not_wait() -> None:
    busy = Busy()
    busy.free = 2
    await busy.enter(submission("a"))
    await busy.enter(submission("b"))
    assert busy.through == ["a", "b"]


async def test_an_instance_that_is_free_takes_one_and_in_order() -> None:
    busy = Busy()
    orders = [
        dataclasses.replace(submission("offline"), offline=True),
        dataclasses.replace(submission("low"), priority=3),
        submission("normal"),
        dataclasses.replace(submission("high"), priority=1),
    ]
    async with asyncio.TaskGroup() as group:
        for order in orders:
            group.create_task(busy.enter(order))
        await until("all to wait", lambda: len(busy.room) == 4)
        for count in range(1, 5):
            busy.free = 1
            await until("one", lambda count=count: len(busy.through) == count)
            await asyncio.sleep(0.06)
            assert len(busy.through) == count
    assert busy.through == ["high", "normal", "low", "offline"]
    assert len(busy.room) == 0


async def test_tenants_take_turns() -> None:
    busy = Busy()
    async with asyncio.TaskGroup() as group:
        for n in range(6):
            salt = "greedy\0" if n < 4 else "modest\0"
            group.create_task(busy.enter(dataclasses.replace(submission(f"{n}"), cache_salt=salt)))
        await until("all to wait", lambda: len(busy.room) == 6)
        for count in range(1, 7):
            busy.free = 1
            await until("one", lambda count=count: len(busy.through) == count)
    assert set(busy.through[:4]) == {"0", "1", "4", "5"}


async def test_one_too_many_is_refused_at_once() -> None:
    busy = Busy(most_waiting=1)
    waiting = asyncio.get_running_loop().create_task(busy.enter(submission("a")))
    await until("it to wait", lambda: len(busy.room) == 1)
    with pytest.raises(QueueFull):
        await busy.enter(submission("b"))
    waiting.cancel()
    await until("it to leave", lambda: len(busy.room) == 0)


async def test_patience_and_deadlines_end_the_waiting() -> None:
    busy = Busy(patience_s=0.1)
    with pytest.raises(QueueTimeout):
        await busy.enter(submission("a"))
    with pytest.raises(DeadlineExceeded):
        await busy.enter(submission("b"), deadline_s=0.05)
    assert len(busy.room) == 0


async def test_a_client_that_leaves_takes_nobodys_turn() -> None:
    busy = Busy()
    loop = asyncio.get_running_loop()
    first = loop.create_task(busy.enter(submission("a")))
    second = loop.create_task(busy.enter(submission("b")))
    await until("both to wait", lambda: len(busy.room) == 2)
    first.cancel()
    busy.free = 1
    await second
    assert busy.through == ["b"]


async def test_a_master_holds_back_what_its_instances_have_no_time_for() -> None:
    async with running_master() as master:
        alone = await master.add("a", Role.DEFAULT)
        await master.mode("default")
        costs = master.parts.router.costs(alone.incarnation)
        costs.enqueue("something large", 1_000_000)
        reader = master.read(submission())
        await until("it to wait", lambda: master.parts.backend._dispatcher.counts()["queued"] == 1)
        assert alone.submissions == []
        costs.dequeue("something large")
        await until("the submission", lambda: alone.submissions)
        await alone.say(0, 11, "stop")
        await reader.ended()
        assert reader.ids == [11]
