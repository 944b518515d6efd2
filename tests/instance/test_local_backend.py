"""The backend of an instance over an engine that says what the test says: deadlines, errors, order, and the journey."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tests.instance.support import outputs, settle, submission
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import DeadlineExceeded, EngineDown, QueueFull
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.request import Submission
from xllm_py.instance.engine_link import EngineLink
from xllm_py.instance.local_backend import LocalBackend
from xllm_py.instance.outlets import Outlets
from xllm_py.openai.backend import Delta, Readiness


class FakeEngine:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.submitted: list[Submission] = []
        self.aborted: list[str] = []
        self.down = False

    def submit(self, given: Submission) -> None:
        if self.down:
            raise EngineDown("it is down")
        self.submitted.append(given)

    def abort(self, request_ids: list[str], attempts: list[int]) -> None:
        self.aborted += request_ids


class Desk:
    """A local backend, and its reader in a task."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.outlets = Outlets(lambda *_: None)
        self.journeys: list[tuple[str, str, dict[str, float]]] = []
        self.deltas: list[Delta] = []
        self.tasks = TaskFamily("desk")
        self.backend = LocalBackend(
            engine=cast("EngineLink", self.engine),
            outlets=self.outlets,
            models=tuple,
            ready=lambda: Readiness(ready=True),
            clock=RealClock(),
            on_journey=lambda given, state, moments: self.journeys.append(
                (given.request_id, state, moments)
            ),
        )

    def read(self, given: Submission) -> asyncio.Task[None]:
        return self.tasks.start(self._read(given), name="read")

    async def _read(self, given: Submission) -> None:
        async for delta in self.backend.generate(given):
            self.deltas.append(delta)


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_what_came_before_an_error_is_read_before_it_is_raised(desk: Desk) -> None:
    reading = desk.read(submission("a"))
    await settle()
    step = outputs(("a", 0, 5), ("a", 1, 6), ("a", 2, -1, "queue_full"))
    step.messages[2] = "too many"
    desk.outlets.on_outputs(step)
    with pytest.raises(QueueFull, match="too many"):
        await asyncio.wait_for(reading, 5)
    assert desk.deltas == [Delta(position=0, token_ids=(5, 6))]
    assert desk.outlets.num_open == 0
    assert [(name, state) for name, state, _ in desk.journeys] == [("a", "queue_full")]


async def test_the_engines_death_reaches_the_reader_at_once(desk: Desk) -> None:
    reading = desk.read(submission("a"))
    await settle()
    desk.outlets.on_outputs(outputs(("a", 0, 5)))
    desk.outlets.fail_all(EngineDown("it died"))
    with pytest.raises(EngineDown):
        await asyncio.wait_for(reading, 5)
    assert [delta.token_ids for delta in desk.deltas] == [(5,)]


async def test_an_engine_that_is_down_leaves_no_outlet(desk: Desk) -> None:
    desk.engine.down = True
    with pytest.raises(EngineDown):
        await desk.read(submission("a"))
    assert desk.outlets.num_open == 0


async def test_a_silent_engine_ends_at_the_deadline_with_a_little_grace(desk: Desk) -> None:
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(desk.read(submission("a", timeout_s=-1.9)), 5)
    assert desk.engine.aborted == ["a"]
    assert desk.outlets.num_open == 0


async def test_a_finished_request_is_not_aborted_and_its_journey_is_kept(desk: Desk) -> None:
    reading = desk.read(submission("a"))
    await settle()
    step = outputs(("a", 0, 5), ("a", 1, 6, "stop"))
    step.journeys.update({0: {"received": 0.0}, 1: {"finished": 0.5}})
    step.cached_tokens[1] = 2
    desk.outlets.on_outputs(step)
    await asyncio.wait_for(reading, 5)
    assert desk.deltas == [
        Delta(position=0, token_ids=(5, 6), finish_reason="stop", cached_tokens=2)
    ]
    assert desk.journeys == [("a", "finished", {"received": 0.0, "finished": 0.5})]
    assert desk.engine.aborted == []


async def test_choices_are_not_joined_with_each_other(desk: Desk) -> None:
    reading = desk.read(submission("a"))
    await settle()
    step = outputs(("a", 0, 1), ("a", 1, 2), ("a", 0, 3), ("a", 2, 4, "stop"))
    step.choices[2] = 1
    desk.outlets.on_outputs(step)
    await asyncio.wait_for(reading, 5)
    assert [(delta.choice, delta.token_ids) for delta in desk.deltas] == [
        (0, (1, 2)),
        (1, (3,)),
        (0, (4,)),
    ]
