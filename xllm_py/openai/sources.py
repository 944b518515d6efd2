"""One stream of news from the backend generators of one response.

A single prompt is read directly. Several prompts have a pump task each; a pump takes its next delta only when the last
one was taken from it, so that a slow reader is felt by every backend generator. Called by `generation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from xllm_py.base import log
from xllm_py.base.errors import RequestError
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.request import Submission
from xllm_py.openai.backend import Backend, Delta

_log = log.get(__name__)
_STOP_TIMEOUT_S = 5.0

News = list[tuple[int, Delta]]


class Sources(Protocol):
    """Deltas with the index of their prompt."""

    async def next(self) -> News:
        """At least one delta, or [] when every generator has ended. Raises what a generator raised."""
        ...

    async def close(self, index: int) -> None:
        """End one prompt's generator early."""
        ...

    async def aclose(self) -> None:
        """End them all."""
        ...


class _Single:
    """One prompt."""

    def __init__(self, deltas: AsyncGenerator[Delta, None]) -> None:
        self._deltas = deltas

    async def next(self) -> News:
        """See Sources."""
        delta = await anext(self._deltas, None)
        return [] if delta is None else [(0, delta)]

    async def close(self, index: int) -> None:
        """See Sources."""
        await self._deltas.aclose()

    async def aclose(self) -> None:
        """See Sources."""
        await self._deltas.aclose()


class _Many:
    """Several prompts."""

    def __init__(
        self, generators: Sequence[AsyncGenerator[Delta, None]], tasks: TaskFamily
    ) -> None:
        self._ready: News = []
        self._failure: RequestError | None = None
        self._wake = asyncio.Event()
        self._taken = [asyncio.Event() for _ in generators]
        self._pumps = [
            tasks.start(self._pump(index, deltas), name=f"prompt {index}")
            for index, deltas in enumerate(generators)
        ]
        for pump in self._pumps:
            pump.add_done_callback(lambda _: self._wake.set())

    async def _pump(self, index: int, deltas: AsyncGenerator[Delta, None]) -> None:
        taken = self._taken[index]
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._ready.append((index, delta))
                    self._wake.set()
                    await taken.wait()
                    taken.clear()
        except RequestError as error:
            self._failure = self._failure or error

    async def next(self) -> News:
        """See Sources."""
        while not self._ready:
            for pump in self._pumps:
                if pump.done() and not pump.cancelled():
                    pump.result()  # a bug of the backend ends the whole request
            if self._failure is not None:
                raise self._failure
            if all(pump.done() for pump in self._pumps):
                return []
            self._wake.clear()
            await self._wake.wait()
        news, self._ready = self._ready, []
        for index, _ in news:
            self._taken[index].set()
        return news

    async def close(self, index: int) -> None:
        """See Sources."""
        self._pumps[index].cancel()
        self._ready = [entry for entry in self._ready if entry[0] != index]

    async def aclose(self) -> None:
        """See Sources."""
        pending = [pump for pump in self._pumps if not pump.done()]
        for pump in pending:
            pump.cancel()
        if pending:
            _, late = await asyncio.wait(pending, timeout=_STOP_TIMEOUT_S)
            if late:
                _log.warning("generators did not close", num=len(late), waited_s=_STOP_TIMEOUT_S)


def open_sources(backend: Backend, submissions: Sequence[Submission], tasks: TaskFamily) -> Sources:
    """Start generating; to be closed with `aclose` whatever happens."""
    generators = [backend.generate(submission) for submission in submissions]
    return _Single(generators[0]) if len(generators) == 1 else _Many(generators, tasks)
