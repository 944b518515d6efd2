"""Where the engine's outputs go: to this instance's own HTTP door, or to a master.

Every open request has exactly one outlet from the moment it is submitted or reserved until its finish has been handed on.
Called by the engine link with each step's columns; hands whole columns on, one message per destination.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm_py.base.errors import RequestError, request_error
from xllm_py.core.plan import FINISH_LENGTH, FINISH_STOP, Outputs
from xllm_py.core.request import FirstToken, Submission
from xllm_py.instance.token_logs import TokenLog, TokenLogs
from xllm_py.openai.backend import Delta
from xllm_py.wire import messages as m

GOOD_FINISHES = frozenset({"", FINISH_STOP, FINISH_LENGTH})


@dataclass(frozen=True, slots=True)
class Destination:
    """A Generations stream: to a master's rpc address, or in relayed mode to the giver's control address."""

    address: str
    relay: bool = False
    master: str = ""  # relayed: the master behind the giver
    incarnation: str = (
        ""  # relayed: the giver that asked; its next life knows nothing of the request
    )


@dataclass(frozen=True, slots=True)
class RemoteOutlet:
    """Where the outputs of one attempt go, and how many of its choices have not ended."""

    destination: Destination
    attempt: int
    num_going_on: int
    log: TokenLog | None = None  # what it says, when that is kept


@dataclass(slots=True)
class LocalOutlet:
    """What one local request has said and its consumer has not yet taken."""

    deltas: deque[Delta] = field(default_factory=deque)
    error: RequestError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    journey: dict[str, float] = field(default_factory=dict)

    def put(self, delta: Delta) -> None:
        """Add news and wake the consumer."""
        self.deltas.append(delta)
        self.news.set()

    def fail(self, error: RequestError) -> None:
        """End with an error after what is already queued."""
        self.error = error
        self.news.set()


class Outlets:
    """All open requests of this instance, by id."""

    def __init__(
        self, send: Callable[[Destination, Outputs], None], logs: TokenLogs | None = None
    ) -> None:
        """logs: of an instance that masters speak to."""
        self._send = send
        self._logs = logs
        self._local: dict[str, LocalOutlet] = {}
        self._remote: dict[str, RemoteOutlet] = {}

    def open_local(self, request_id: str) -> LocalOutlet:
        """For a request of our own HTTP door."""
        outlet = self._local[request_id] = LocalOutlet()
        return outlet

    def open_remote(self, submission: Submission, destination: Destination) -> None:
        """For a request a master or a giver sent us; a later attempt takes the place of an earlier one."""
        self._remote[submission.request_id] = RemoteOutlet(
            destination,
            submission.attempt,
            submission.sampling.best_of,
            self._logs.open(submission) if self._logs is not None else None,
        )

    def close(self, request_id: str, attempt: int = 0) -> None:
        """Forget a request, or one attempt of it; what the engine still says of it goes nowhere."""
        self._local.pop(request_id, None)
        outlet = self._remote.get(request_id)
        if outlet is not None and attempt in (0, outlet.attempt):
            self._drop(request_id, outlet)

    def _drop(self, request_id: str, outlet: RemoteOutlet) -> None:
        del self._remote[request_id]
        if outlet.log is not None and self._logs is not None:
            self._logs.end(outlet.log)

    def on_first(self, first: FirstToken) -> None:
        """The giver has said this token, behind those of earlier attempts."""
        outlet = self._remote.get(first.request_id)
        if outlet is not None and outlet.log is not None and outlet.attempt == first.attempt:
            outlet.log.put(outlet.log.num_before, first.token_ids[0])

    def on_reservations_ended(self, ended: m.ReservationsEnded) -> None:
        """What was promised to a giver and will never run says nothing any more."""
        for request_id, attempt in zip(ended.request_ids, ended.attempts, strict=True):
            outlet = self._remote.get(request_id)
            if outlet is not None and outlet.attempt == attempt:
                self._drop(request_id, outlet)

    def on_outputs(self, outputs: Outputs) -> None:
        """Distribute one step."""
        columns: dict[Destination, Outputs] = {}
        for index, request_id in enumerate(outputs.request_ids):
            outlet = self._local.get(request_id)
            if outlet is not None:
                _put_local(outlet, outputs, index)
                continue
            remote = self._remote.get(request_id)
            if remote is None or remote.attempt != outputs.attempts[index]:
                continue
            column = columns.setdefault(remote.destination, Outputs(step=outputs.step))
            copy_entry(outputs, index, column)
            if remote.log is not None and outputs.token_ids[index] >= 0:
                remote.log.put(outputs.positions[index], outputs.token_ids[index])
            reason = outputs.finish_reasons[index]
            if reason and reason not in GOOD_FINISHES:
                self._drop(request_id, remote)
            elif reason:
                self._choice_ended(request_id, remote)
        for destination, column in columns.items():
            self._send(destination, column)

    def _choice_ended(self, request_id: str, remote: RemoteOutlet) -> None:
        left = dataclasses.replace(remote, num_going_on=remote.num_going_on - 1)
        if left.num_going_on:
            self._remote[request_id] = left
        else:
            self._drop(request_id, remote)

    def reroute(self, request_ids: list[str], destination: Destination) -> None:
        """What these say from now on goes elsewhere; those that have ended meanwhile are passed over."""
        for request_id in request_ids:
            outlet = self._remote.get(request_id)
            if outlet is not None:
                self._remote[request_id] = dataclasses.replace(outlet, destination=destination)

    def destination(self, request_id: str) -> Destination | None:
        """Where the outputs of a master's request go."""
        outlet = self._remote.get(request_id)
        return None if outlet is None else outlet.destination

    def awaits(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt, or a later one, is open here."""
        outlet = self._remote.get(request_id)
        return outlet is not None and outlet.attempt >= attempt

    def fail_all(self, error: RequestError) -> None:
        """The engine is down: every local consumer hears it; masters see our connection end."""
        for outlet in self._local.values():
            outlet.fail(error)
        self._remote.clear()

    @property
    def num_open(self) -> int:
        """Requests with an outlet, for the ledger."""
        return len(self._local) + len(self._remote)

    def has(self, request_id: str) -> bool:
        """Whether a request is open here."""
        return request_id in self._local or request_id in self._remote


def _put_local(outlet: LocalOutlet, outputs: Outputs, index: int) -> None:
    reason = outputs.finish_reasons[index]
    outlet.journey |= outputs.journeys.get(index, {})
    if reason not in GOOD_FINISHES:
        outlet.fail(request_error(reason, outputs.messages.get(index, reason)))
        return
    token_id = outputs.token_ids[index]
    outlet.put(
        Delta(
            choice=outputs.choices[index],
            position=outputs.positions[index],
            token_ids=(token_id,) if token_id >= 0 else (),
            finish_reason=reason,
            cached_tokens=outputs.cached_tokens.get(index, 0),
            logprobs=(outputs.logprobs[index],) if index in outputs.logprobs else (),
            prompt_logprobs=tuple(outputs.prompt_logprobs.get(index, ())),
        )
    )


def copy_entry(source: Outputs, index: int, target: Outputs) -> None:
    """Append one entry of `source` to `target`, sparse columns included."""
    at = target.add(
        source.request_ids[index],
        source.attempts[index],
        choice=source.choices[index],
        position=source.positions[index],
        token_id=source.token_ids[index],
        finish_reason=source.finish_reasons[index],
    )
    if index in source.messages:
        target.messages[at] = source.messages[index]
    if index in source.cached_tokens:
        target.cached_tokens[at] = source.cached_tokens[index]
    if index in source.journeys:
        target.journeys[at] = source.journeys[index]
    if index in source.logprobs:
        target.logprobs[at] = source.logprobs[index]
    if index in source.prompt_logprobs:
        target.prompt_logprobs[at] = source.prompt_logprobs[index]
