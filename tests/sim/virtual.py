"""One thread, one hand-turned clock: an event loop that never sleeps, and the simulated processes that live on it.

Time moves only when nobody is ready to run; then it jumps to the next timer. A process is a context variable: every task and
callback begun by a process belongs to it, so that it can die as a whole.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from xllm_py.base.clock import HandClock

PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("simulated process")

_INSTANT_S = 1e-9  # nearer than this is the same moment


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
    """asyncio's own loop without selector: waiting turns the clock. Timers of one moment fire in the order they were set."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self.clock = clock
        self.failures: list[str] = []  # what nobody caught
        self._due: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self.set_exception_handler(self._on_exception)

    def time(self) -> float:
        """What the hand shows."""
        return self.clock.now()

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """See asyncio."""
        handle = asyncio.Handle(callback, args, self, context)
        self._due.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        return self.call_at(self.clock.now() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def _run_once(self) -> None:
        """Everything that is ready; when nothing is, time jumps to the next timer."""
        due, timers = self._due, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        now = self.clock.now()
        if not due:
            if not timers:
                raise Hang("nothing is ready and no timer is set")
            if timers[0][0] > now:
                now = self.clock.turn(timers[0][0] - now)
        while timers and timers[0][0] <= now + _INSTANT_S:
            due.append(heapq.heappop(timers)[2])
        for _ in range(len(due)):
            handle = due.popleft()
            if not handle.cancelled():
                handle._run()

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
