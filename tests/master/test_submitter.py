"""Requests that go to one instance together: the first at once, those that come meanwhile in the next call, each with its own answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from tests.master.support import submission, until
from xllm_py.base.errors import PeerUnavailable, QueueFull, XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.bounds import MAX_SUBMISSIONS
from xllm_py.control.client import InstanceClient
from xllm_py.core.request import Submission
from xllm_py.master.submitter import MOST_TOKENS, Submitter


class FakeClient:
    """Answers a call when the test lets it."""

    address = "d:1"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go_on = asyncio.Event()
        self.refusals: dict[str, XllmError] = {}
        self.error: XllmError | None = None

    async def submit(self, submissions: Sequence[Submission]) -> list[XllmError | None]:
        self.calls.append([each.request_id for each in submissions])
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        return [self.refusals.get(each.request_id) for each in submissions]


class House:
    def __init__(self) -> None:
        self.client = FakeClient()
        self.tasks = TaskFamily("house")
        self.submitter = Submitter(cast("InstanceClient", self.client), self.tasks)
        self.asked: list[asyncio.Future[XllmError | None]] = []

    def ask(self, *names: str, **fields: object) -> list[asyncio.Future[XllmError | None]]:
        made = [self.submitter.submit(submission(name, **fields)) for name in names]
        self.asked += made
        return made

    async def answers(self) -> list[object]:
        return await asyncio.gather(*self.asked, return_exceptions=True)


@contextlib.asynccontextmanager
async def house() -> AsyncIterator[House]:
    made = House()
    try:
        yield made
    finally:
        made.client.go_on.set()
        await made.tasks.close()
        await made.answers()


async def test_the_first_goes_alone_and_the_others_together() -> None:
    async with house() as made:
        made.ask("a")
        await until("a call", lambda: made.client.calls)
        made.ask("b", "c")
        await asyncio.sleep(0)
        made.client.refusals["b"] = refusal = QueueFull("full")
        made.client.go_on.set()
        assert await made.answers() == [None, refusal, None]
        assert made.client.calls == [["a"], ["b", "c"]]
        made.ask("d")
        assert (await made.answers())[-1] is None


async def test_a_call_that_fails_fails_those_in_it_and_no_others() -> None:
    async with house() as made:
        made.ask("a")
        await until("a call", lambda: made.client.calls)
        made.client.error = error = PeerUnavailable("gone")
        made.ask("b")
        await asyncio.sleep(0)
        made.client.go_on.set()
        assert await made.answers() == [error, error]
        made.client.error = None
        made.ask("c")
        assert (await made.answers())[-1] is None


async def test_who_waits_no_more_is_not_sent() -> None:
    async with house() as made:
        made.ask("a")
        await until("a call", lambda: made.client.calls)
        (gone, _) = made.ask("b", "c")
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        made.client.go_on.set()
        await made.answers()
        assert made.client.calls == [["a"], ["c"]]


async def test_calls_are_bounded_in_number_and_tokens() -> None:
    async with house() as made:
        made.ask("first")
        await until("a call", lambda: made.client.calls)
        made.ask(*(str(n) for n in range(MAX_SUBMISSIONS + 3)))
        made.ask("long", "longer", prompt_ids=(1,) * (MOST_TOKENS - 50))
        await asyncio.sleep(0)
        made.client.go_on.set()
        await made.answers()
        assert [len(call) for call in made.client.calls] == [1, MAX_SUBMISSIONS, 4, 1]


async def test_those_that_wait_when_it_all_ends_are_told() -> None:
    async with house() as made:
        made.ask("a")
        await until("a call", lambda: made.client.calls)
        made.ask("b")
        await asyncio.sleep(0)
        await made.tasks.close()
        assert [type(each) for each in await made.answers()] == [PeerUnavailable] * 2
        with pytest.raises(PeerUnavailable):
            raise (await made.answers())[0]  # type: ignore[misc]
