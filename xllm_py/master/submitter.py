"""Hands requests to one life of an instance: those that come while a call is under way go together in the next one.

A call costs ten times what a request in it does, so under load the calls fill and with nothing to do a request waits for nobody. Made by
master/peers, one for each client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from xllm_py.base.errors import PeerUnavailable, XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.bounds import MAX_SUBMISSIONS
from xllm_py.control.client import InstanceClient
from xllm_py.core.request import Submission

MOST_TOKENS = 1 << 16  # of the prompts in one call, unless it is one


@dataclass(slots=True, eq=False)
class _Waiting:
    submission: Submission
    answer: asyncio.Future[XllmError | None]  # cancelled when nobody waits any more

    @property
    def num_tokens(self) -> int:
        return len(self.submission.prompt_ids) + len(self.submission.generated_ids)


class Submitter:
    """See the module's text."""

    def __init__(self, client: InstanceClient, tasks: TaskFamily) -> None:
        self._client = client
        self._tasks = tasks
        self._waiting: deque[_Waiting] = deque()
        self._calling = False

    def submit(self, submission: Submission) -> asyncio.Future[XllmError | None]:
        """Its refusal, PeerUnavailable, or None when it was accepted. Cancelled before it has left, it does not leave."""
        waiting = _Waiting(submission, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if not self._calling:
            self._calling = True
            self._tasks.start(self._call(), name=f"submit to {self._client.address}")
        return waiting.answer

    async def _call(self) -> None:
        batch: list[_Waiting] = []
        try:
            while batch := self._next():
                try:
                    refusals = await self._client.submit([each.submission for each in batch])
                except XllmError as error:
                    refusals = [error] * len(batch)
                _answer(batch, refusals)
        finally:
            self._calling = False
            left = [*batch, *self._waiting]
            self._waiting.clear()
            _answer(left, [PeerUnavailable("Submit: the master is stopping")] * len(left))

    def _next(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        num_tokens = 0
        while self._waiting and len(batch) < MAX_SUBMISSIONS:
            if batch and num_tokens + self._waiting[0].num_tokens > MOST_TOKENS:
                break
            each = self._waiting.popleft()
            if not each.answer.done():
                batch.append(each)
                num_tokens += each.num_tokens
        return batch


def _answer(batch: list[_Waiting], refusals: list[XllmError | None]) -> None:
    for each, refusal in zip(batch, refusals, strict=True):
        if not each.answer.done():
            each.answer.set_result(refusal)
