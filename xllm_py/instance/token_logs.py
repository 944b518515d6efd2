"""What this instance said of requests that their client may go on with at another master: kept until a while after their end.

Instances are the replicas of a master's token logs. A master that dies takes its logs with it; the next one asks every instance by the
stream's id (Describe), puts what they say together, and goes on from there without computing it again. Only requests that have a stream
id are kept, with one choice and without logprobs: of the others a new master knows too little, and makes them anew.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from xllm_py.base.clock import Clock
from xllm_py.core.request import Submission

KEEP_S = 15.0  # after the end; longer than a master is waited for
MOST_KEPT = 2000
MOST_BYTES = 64 << 20  # of what was asked
UNKNOWN = -1  # a token that another instance said


@dataclass(slots=True)
class TokenLog:
    """One request, of its latest attempt here."""

    request_id: str
    attempt: int
    origin: bytes
    num_before: int = 0  # tokens of earlier attempts
    ids: list[int] = field(default_factory=list)
    ended_at: float | None = None

    def put(self, position: int, token: int) -> None:
        """A token that was said here."""
        missing = position - len(self.ids)
        if missing >= 0:
            self.ids += [UNKNOWN] * missing
            self.ids.append(token)
        elif self.ids[position] == UNKNOWN:
            self.ids[position] = token


class TokenLogs:
    """By stream id; the oldest go first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logs: OrderedDict[str, TokenLog] = OrderedDict()
        self._num_bytes = 0  # of their origins

    def open(self, submission: Submission) -> TokenLog | None:
        """Begin one, in place of an earlier attempt's; None when it is not to be kept."""
        sampling = submission.sampling
        if not submission.stream_id or sampling.best_of > 1 or sampling.logprobs >= 0:
            return None
        self._drop(submission.stream_id)
        log = TokenLog(
            submission.request_id,
            submission.attempt,
            submission.origin,
            len(submission.generated_ids),
            list(submission.generated_ids),
        )
        self._logs[submission.stream_id] = log
        self._num_bytes += len(log.origin)
        self._sweep()
        return log

    def end(self, log: TokenLog) -> None:
        """Nothing more will be said."""
        log.ended_at = self._clock.now()

    def find(self, stream_id: str) -> TokenLog | None:
        """What was said under this id, as long as it is kept."""
        self._sweep()
        return self._logs.get(stream_id)

    def _sweep(self) -> None:
        now = self._clock.now()
        over = [
            name
            for name, log in self._logs.items()
            if log.ended_at is not None and now - log.ended_at > KEEP_S
        ]
        for name in over:
            self._drop(name)
        while len(self._logs) > MOST_KEPT or self._num_bytes > MOST_BYTES:
            self._drop(next(iter(self._logs)))

    def _drop(self, stream_id: str) -> None:
        log = self._logs.pop(stream_id, None)
        if log is not None:
            self._num_bytes -= len(log.origin)


def as_json(log: TokenLog | None) -> dict[str, Any]:
    """For Describe."""
    if log is None:
        return {}
    return {"ids": log.ids, "origin": base64.b64encode(log.origin).decode()}
