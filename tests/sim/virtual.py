"""One thread, one hand-turned clock: an event loop that never sleeps, and the simulated processes that live on it.

Time moves only when nobody is ready to run; then it jumps to the next timer. A process is a context variable: every task and
callback begun by a process belongs to it, so that it can die as a whole.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

from xllm_py.base.clock import HandClock

PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("simulated process")


class Hang(Exception):
    """Nothing is ready and no timer is set: nothing can ever happen again."""


class Process:
    """One simulated process: its name, its control port, and everything that runs in it."""

    def __init__(self, name: str, port: int, network: Any) -> None:
        self.name = name
        self.port = port
        self.network = network
        self.alive = True
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    @property
    def address(self) -> str:
        """Of its control port."""
        return f"127.0.0.1:{self.port}"

    def end_tasks(self) -> list[asyncio.Task[Any]]:
        """Cancel all in the order of their start; returns those that have to be awaited."""
        self.alive = False
        open_tasks = [task for task in self.tasks if not task.done()]
        for task in open_tasks:
            task.cancel()
        return open_tasks


class VirtualLoop(asyncio.BaseEventLoop):
    """asyncio's own loop without selector: waiting turns the clock."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self.clock = clock
        self._selector = self
        self.failures: list[str] = []  # what nobody caught
        self.set_exception_handler(self._on_exception)

    def time(self) -> float:
        """What the hand shows."""
        return self.clock.now()

    def select(self, timeout: float | None) -> list[Any]:
        """Called by the loop when it would wait for sockets."""
        if timeout is None:
            raise Hang("nothing is ready and no timer is set")
        if timeout > 0:
            self.clock.turn(timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def _on_exception(self, _loop: object, context: dict[str, Any]) -> None:
        self.failures.append(f"{context['message']}: {context.get('exception')!r}")

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        """Of whom it is begun."""
        task = super().create_task(coro, name=name, context=context)
        process = context[PROCESS] if context is not None else PROCESS.get(None)
        if process is not None:
            if len(process.tasks) > 200:
                process.tasks = [each for each in process.tasks if not each.done()]
            process.tasks.append(task)
        return task
