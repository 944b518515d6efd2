"""One family of asyncio tasks that stops together.

Every task of a daemon belongs to a `TaskFamily`. A task that fails is logged once and, if it was started as `vital`, ends
the family: `wait_failed` returns its exception and the daemon shuts down in order. This is one of the four places that
catch everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from xllm_py.base import log

_log = log.get(__name__)


class TaskFamily:
    """Owns tasks; `close` cancels and awaits them all, within a limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: list[BaseException] = []  # of vital tasks, also those nobody waits for yet
        self._failed = asyncio.Event()
        self._closing = False

    def start(
        self, work: Coroutine[Any, Any, Any], *, name: str, vital: bool = False
    ) -> asyncio.Task[Any]:
        """Run `work` in this family. The name shows in logs and in the ledger."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._on_done(done, vital))
        return task

    def _on_done(self, task: asyncio.Task[Any], vital: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled() or self._closing:
            return
        error = task.exception()
        if error is not None:
            _log.error("task failed", task=task.get_name(), exc_info=error)
        if vital:
            self._failures.append(error or RuntimeError(f"{task.get_name()} ended"))
            self._failed.set()

    async def wait_failed(self) -> BaseException:
        """Return once a vital task has failed or ended, be it before the call; the first one's error."""
        await self._failed.wait()
        return self._failures[0]

    @property
    def size(self) -> int:
        """Tasks alive, for the ledger."""
        return len(self._tasks)

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """Cancel everything and wait; what does not end in time is named in the log."""
        self._closing = True
        current = asyncio.current_task()
        pending = [task for task in self._tasks if task is not current]
        for task in pending:
            task.cancel()
        if not pending:
            return
        _, late = await asyncio.wait(pending, timeout=timeout_s)
        for task in late:
            _log.warning("task did not stop", task=task.get_name(), waited_s=timeout_s)
