"""Holds new requests back while every instance has work for some seconds, so that order and shares are the master's, not of who sent most.

cluster/door says who is next; this asks the router whether anybody is free, and wakes whom it lets through. A resumed request does not wait here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm_py.base.clock import Clock
from xllm_py.base.errors import DeadlineExceeded, QueueFull, QueueTimeout
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.door import Door, Ticket, level_of
from xllm_py.core.request import Submission

HELD_S = 5.0  # of work that waits at an instance; more would only be a queue nobody can order
MOST_TOKENS = 1 << 23  # of prompts that wait here
_LOOK_S = 0.02
_RETRY_S = 1.0


class WaitingRoom:
    """One master's."""

    def __init__(
        self,
        *,
        most_waiting: int,
        patience_s: float,
        soonest_s: Callable[[str], float],
        tasks: TaskFamily,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """soonest_s: when, predicted, the freest instance of a model gets to a new request; infinite is nobody, and no reason to wait here."""
        self._door = Door(most_waiting=most_waiting, most_tokens=MOST_TOKENS)
        self._patience_s = patience_s
        self._soonest_s = soonest_s
        self._tasks = tasks
        self._clock = clock
        self._bells: dict[Ticket, asyncio.Event] = {}
        self._looking: asyncio.Task[None] | None = None  # while anybody waits
        self._num_passing = (
            0  # let through, and not placed yet: nobody else is, until the instance is free no more
        )
        metrics.gauge("requests_queued", "Held back by the master").set_function(
            lambda: float(len(self))
        )

    def __len__(self) -> int:
        return len(self._door)

    async def pass_through(self, submission: Submission, deadline: float) -> None:
        """Return when it is this request's turn. Raises QueueFull at once, QueueTimeout or DeadlineExceeded later."""
        if not self._bells and self._is_free(submission.model):
            return
        tokens, now = len(submission.prompt_ids), self._clock.now()
        if not self._door.has_room(tokens):
            raise QueueFull(
                f"{len(self._door)} requests wait already; try again later", retry_after_s=_RETRY_S
            )
        ticket = Ticket(
            tenant=submission.cache_salt.partition("\0")[0],
            tokens=tokens,
            level=level_of(submission.priority, offline=submission.offline),
            since=now,
            model=submission.model,
        )
        self._door.enter(ticket)
        bell = self._bells[ticket] = asyncio.Event()
        if self._looking is None or self._looking.done():
            self._looking = self._tasks.start(self._look(), name="waiting room")
        try:
            async with asyncio.timeout(min(deadline - now, self._patience_s)):
                await bell.wait()
        except TimeoutError as error:
            if deadline - now <= self._patience_s:
                raise DeadlineExceeded(
                    "the request's deadline passed while it waited for its turn"
                ) from error
            raise QueueTimeout(
                f"no instance had time for the request within {self._patience_s:g} s",
                retry_after_s=_RETRY_S,
            ) from error
        finally:
            self._door.leave(ticket)
            del self._bells[ticket]
            self._num_passing -= bell.is_set()

    async def _look(self) -> None:
        """Let one after the other through as instances get free, until nobody waits."""
        while self._bells:
            chosen = None
            if not self._num_passing:
                now = self._clock.now()
                chosen = self._door.take(now, lambda ticket: self._is_free(ticket.model))
            if chosen is not None:
                self._bells[chosen].set()
                self._num_passing += 1
            await asyncio.sleep(_LOOK_S if chosen is None else 0)

    def _is_free(self, model: str) -> bool:
        soonest_s = self._soonest_s(model)
        return soonest_s <= HELD_S or soonest_s == float("inf")
