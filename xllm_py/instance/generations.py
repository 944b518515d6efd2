"""Streams of outputs from this instance to masters, or in relayed mode to the giver: sent in order, kept until acknowledged.

One stream per destination. Every entry of a request stays in its log until the other side has acknowledged it, so a stream that
breaks is opened again and goes on from the first unacknowledged position. A relayed stream that breaks does not come back: the
requests that spoke on it go straight to the master from there on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from xllm_py.base import failpoints, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.plan import Outputs
from xllm_py.instance.outlets import Destination, copy_entry
from xllm_py.wire.control_messages import GenerationsDown, GenerationsUp, no_verdicts
from xllm_py.wire.messages import Verdicts

GIVE_UP_S = 10.0  # requests of a master that is away for so long are dropped
_FIRST_RETRY_S = 0.05
_MOST_RETRY_S = 1.0

_log = log.get(__name__)


class Stream(Protocol):
    """control.client.GenerationsStream."""

    async def send(self, up: GenerationsUp) -> None:
        """Raises PeerUnavailable."""
        ...

    def __aiter__(self) -> object:
        """GenerationsDown until the stream ends."""
        ...

    async def close(self) -> None:
        """At once."""
        ...


@dataclass(slots=True)
class _Told:
    """What was said of one request and attempt and is not acknowledged; a column per entry."""

    entries: Outputs = field(default_factory=Outputs)


Key = tuple[str, int]  # request, attempt
Connect = Callable[[str, Literal["master", "instance"], str], Stream]  # where, what, whom


class Generations:
    """All streams of this instance."""

    def __init__(  # noqa: PLR0913  half of them are what the other side may say or do
        self,
        *,
        name: str,
        incarnation: str,
        connect: Connect,
        tasks: TaskFamily,
        clock: Clock,
        on_cancel: Callable[[list[str], list[int]], None],
        on_relayed: Callable[[GenerationsDown], GenerationsDown],
        on_broken: Callable[[Destination], None],
        on_rerouted: Callable[[list[str], Destination], None],
    ) -> None:
        """on_cancel: the other side wants these ended. on_relayed: takes out of a master's word what is meant for D.

        on_broken: a stream to a master broke, and what was forwarded on it may be lost. on_rerouted: what these requests say
        from now on is to be sent to another destination.
        """
        self.name = name
        self.incarnation = incarnation
        self.connect = connect
        self.clock = clock
        self.on_cancel = on_cancel
        self.on_relayed = on_relayed
        self.on_broken = on_broken
        self.on_rerouted = on_rerouted
        self._tasks = tasks
        self._streams: dict[Destination, _Talk] = {}

    def open(self, destination: Destination) -> _Talk:
        """The stream to a destination, begun when there is none."""
        talk = self._streams.get(destination)
        if talk is None:
            talk = self._streams[destination] = _Talk(self, destination)
            name = f"generations-{destination.address}"
            talk.task = self._tasks.start(self._run(talk), name=name)
        return talk

    async def _run(self, talk: _Talk) -> None:
        try:
            await talk.run()
        finally:
            if self._streams.get(talk.destination) is talk:
                del self._streams[talk.destination]

    def send(self, destination: Destination, outputs: Outputs) -> None:
        """One step's entries."""
        self.open(destination).put(outputs)

    def send_verdicts(self, destination: Destination, verdicts: Verdicts) -> None:
        """How handoffs ended; not repeated, the master lives without them."""
        self.open(destination).put_verdicts(verdicts)

    def forward(self, destination: Destination, up: GenerationsUp) -> None:
        """Pass another instance's message on, unchanged."""
        self.open(destination).forward(up)

    def reroute(self, talk: _Talk) -> None:
        """The giver is gone: what it did not acknowledge goes straight to the master."""
        straight = Destination(talk.destination.master)
        self._streams.pop(talk.destination, None)
        self.on_rerouted([request_id for request_id, _ in talk.told], straight)
        for told in talk.told.values():
            self.send(straight, told.entries)

    def leave(self, giver: str) -> None:
        """A master says that the giver at this address is lost; one that only stands still would not break its streams."""
        for talk in list(self._streams.values()):
            if talk.destination.relay and talk.destination.address == giver:
                self.reroute(talk)
                talk.leave()

    def forget(self, request_id: str, attempt: int) -> None:
        """Nobody waits for this attempt of a request any more; 0: for none of them."""
        for talk in self._streams.values():
            talk.forget(request_id, attempt)

    def is_broken(self, destination: Destination) -> bool:
        """Whether the stream there ended and nobody was heard since."""
        talk = self._streams.get(destination)
        return talk is not None and talk.broken

    @property
    def num_unacknowledged(self) -> int:
        """Requests with entries that were not acknowledged, for the ledger."""
        return sum(len(talk.told) for talk in self._streams.values())


class _Talk:
    """One stream and what was said on it."""

    def __init__(self, owner: Generations, destination: Destination) -> None:
        self._owner = owner
        self.destination = destination
        self.told: dict[Key, _Told] = {}
        self.task: asyncio.Task[None] | None = None  # that talks
        self.broken = False  # nobody was heard since it broke
        self._queue: list[GenerationsUp] = []
        self._news = asyncio.Event()
        self._sequence = 0

    def put(self, outputs: Outputs) -> None:
        """Remember and queue."""
        for index, request_id in enumerate(outputs.request_ids):
            told = self.told.setdefault((request_id, outputs.attempts[index]), _Told())
            copy_entry(outputs, index, told.entries)
        self._enqueue(outputs, no_verdicts())

    def put_verdicts(self, verdicts: Verdicts) -> None:
        """Queue; not remembered."""
        self._enqueue(Outputs(), verdicts)

    def _enqueue(self, outputs: Outputs, verdicts: Verdicts) -> None:
        self.forward(
            GenerationsUp(
                name=self._owner.name,
                incarnation=self._owner.incarnation,
                sequence=self._sequence,
                outputs=outputs,
                verdicts=verdicts,
            )
        )
        self._sequence += 1

    def forward(self, up: GenerationsUp) -> None:
        """Queue a message as it is."""
        self._queue.append(up)
        self._news.set()

    def forget(self, request_id: str, attempt: int) -> None:
        """Drop the log of an attempt; 0: of all."""
        if attempt:
            self.told.pop((request_id, attempt), None)
            return
        for key in [key for key in self.told if key[0] == request_id]:
            del self.told[key]

    def leave(self) -> None:
        """Say nothing more."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Talk; after a break talk again, as long as somebody may still be waiting."""
        clock, retry_s = self._owner.clock, _FIRST_RETRY_S
        broken_at = clock.now()
        while True:
            began = clock.now()
            try:
                await self._talk()
                reason = "closed by the other side"
            except XllmError as error:
                reason = error.message
            now = clock.now()
            if not self.broken or now - began > 1.0:  # somebody was there
                broken_at, retry_s = now, _FIRST_RETRY_S
            self.broken = True
            _log.debug("stream broken", to=self.destination.address, reason=reason)
            if self.destination.relay:
                self._owner.reroute(self)
                return
            self._owner.on_broken(self.destination)
            if now - broken_at > GIVE_UP_S:
                self._give_up(reason)
                return
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _MOST_RETRY_S)

    def _give_up(self, reason: str) -> None:
        """Nobody listens: end the requests, so that they hold no blocks."""
        if self.told:
            _log.warning(
                "master away, requests dropped", master=self.destination.address, reason=reason
            )
        self._owner.on_cancel([key[0] for key in self.told], [key[1] for key in self.told])
        self.told.clear()

    async def _talk(self) -> None:
        """One connection: everything unacknowledged first, then the queue, until it breaks."""
        kind: Literal["master", "instance"] = "instance" if self.destination.relay else "master"
        to = self.destination
        stream = self._owner.connect(to.address, kind, to.incarnation)
        reading = TaskFamily(f"downs-{self.destination.address}")
        try:
            waiting, self._queue = self._queue, []
            self._enqueue(Outputs(), no_verdicts())  # says who speaks, so it goes first
            self._queue += [up for up in waiting if not up.outputs.request_ids or self._foreign(up)]
            for told in self.told.values():
                self._enqueue(told.entries, no_verdicts())
            reader = reading.start(self._read(stream), name="read")
            reader.add_done_callback(lambda _: self._news.set())
            while not reader.done():
                self._news.clear()
                queue, self._queue = self._queue, []
                for up in queue:
                    await _send(stream, up)
                if not self._queue:
                    await self._news.wait()
            broken = await reader
            if broken is not None:
                raise broken
        finally:
            await reading.close()
            await stream.close()

    def _foreign(self, up: GenerationsUp) -> bool:
        """Whether it is a forwarded message; our own outputs are in the log."""
        return up.incarnation != self._owner.incarnation

    async def _read(self, stream: Stream) -> XllmError | None:
        """Until the stream ends; what broke it is a result, because a lost peer is no failure of this task."""
        try:
            async for down in stream:  # type: ignore[attr-defined]  # the protocol above is deliberately loose here
                self._on_down(self._owner.on_relayed(down))
        except XllmError as error:
            return error
        return None

    def _on_down(self, down: GenerationsDown) -> None:
        self.broken = False
        acks = zip(
            down.acks.request_ids,
            down.acks.attempts,
            down.acks.choices,
            down.acks.nexts,
            strict=True,
        )
        for request_id, attempt, choice, position in acks:
            self._acknowledge((request_id, attempt), choice, position)
        again = set(zip(down.again.request_ids, down.again.attempts, strict=True))
        for key in again & self.told.keys():
            self._enqueue(self.told[key].entries, no_verdicts())
        if down.cancels.request_ids:
            for key in zip(down.cancels.request_ids, down.cancels.attempts, strict=True):
                self.forget(*key)
            self._owner.on_cancel(down.cancels.request_ids, down.cancels.attempts)

    def _acknowledge(self, key: Key, choice: int, position: int) -> None:
        """Forget what the other side has; entries of a request with one choice leave from the front."""
        told = self.told.get(key)
        if told is None:
            return
        kept = Outputs()
        entries = told.entries
        for index, at in enumerate(entries.positions):
            if entries.choices[index] != choice or at >= position:
                copy_entry(entries, index, kept)
        if kept.request_ids:
            told.entries = kept
        else:
            del self.told[key]


async def _send(stream: Stream, up: GenerationsUp) -> None:
    said = bool(up.outputs.request_ids)
    if said:
        failpoints.hit("d.delta.pre_send")
    await stream.send(up)
    if said:
        failpoints.hit("d.delta.post_send")
    if any(up.outputs.finish_reasons):
        failpoints.hit("d.fin")
