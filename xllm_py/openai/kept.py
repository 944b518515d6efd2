"""Answers that outlive the connection they were asked over: requests with an Idempotency-Key.

The answer is produced once, into a list of events; every connection that asks for it follows that list from wherever it likes. So a client that
lost its connection asks again, with the same key and body, or by GET /v1/streams/{id}, and goes on behind the last event it saw; and one that
asks twice gets one answer. An answer is kept for a minute after its end, and given up a minute after the last reader left.

Another master knows nothing of the list, but makes the same one: seeds and the id come from key and body, and an event never holds more than one
token, so that "after position n" is the same place in both. It asks the instances what they have said of it already (Backend.recall), and what was
asked when the client brings nothing but the id. Held in memory, bounded in number and bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace

import msgspec

from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    ConcurrencyLimit,
    IdempotencyConflict,
    InvalidValue,
    PositionBeyondEnd,
    RequestError,
)
from xllm_py.core.request import MAX_ORIGIN, Submission
from xllm_py.openai.backend import Backend, Delta, Readiness, ServedModel, Told
from xllm_py.openai.exchange import Exchange

KEEP_S = 60.0
MOST_KEPT = 1000
MOST_BYTES = 256 << 20  # of all; what grows already may pass it
MOST_KEY = 255  # characters
Place = tuple[int, int]  # choice, position


class Origin(msgspec.Struct, array_like=True, frozen=True):
    """What was asked, as it goes along to the instances: whoever finds it there can answer it too."""

    tenant: str
    key: str
    path: str
    body: bytes

    def packed(self) -> bytes:
        """Empty when it is too long: then only the client can ask again."""
        packed = msgspec.msgpack.encode(self)
        return packed if len(packed) <= MAX_ORIGIN else b""


def unpacked(origin: bytes) -> Origin | None:
    """None when there is none, or it makes no sense."""
    try:
        return msgspec.msgpack.decode(origin, type=Origin) if origin else None
    except msgspec.DecodeError:
        return None


@dataclass(slots=True, eq=False)
class Kept:
    """One answer, whole or growing."""

    digest: bytes  # of path and body
    identity: bytes  # what its seeds and its id come from
    tenant: str
    origin: bytes
    arrived: float
    arrived_wall: int
    request_id: str = ""
    events: list[bytes] = field(default_factory=list)
    places: dict[Place, int] = field(default_factory=dict)  # -> number of the event
    whole: tuple[int, bytes, tuple[tuple[bytes, bytes], ...]] | None = None
    error: RequestError | None = None
    done: bool = False
    num_bytes: int = 0
    num_readers: int = 0
    idle_since: float = 0.0  # nobody reads, or it is done
    task: asyncio.Task[None] | None = None
    _bell: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- as Generation writes it

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Events of a stream, some at a time."""
        for event in data.split(b"\n\n"):
            if not event:
                continue
            if event.startswith(b"id: "):
                _, choice, position = event[4 : event.index(b"\n")].rsplit(b":", 2)
                self.places[int(choice), int(position)] = len(self.events)
            self.events.append(event + b"\n\n")
            self.num_bytes += len(event) + 2
        self.done = self.done or last
        self.ring()

    async def respond(
        self, status: int, body: bytes, *, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """A whole answer."""
        self.whole, self.done = (status, body, tuple(headers)), True
        self.num_bytes += len(body)
        self.ring()

    def fail(self, error: RequestError) -> None:
        """It ends with an error, unless it has ended."""
        if not self.done:
            self.error, self.done = error, True
        self.ring()

    def ring(self) -> None:
        """Wake all readers."""
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    # ---- as a connection reads it

    async def follow(self, exchange: Exchange, after: Place | None) -> None:
        """Write it to a client, from the beginning or behind an event. Raises its error, or PositionBeyondEnd."""
        at = 0
        while after is not None:
            if after in self.places:
                at = self.places[after] + 1
                break
            if self.done:
                raise self.error or PositionBeyondEnd("the answer ended before that position")
            await self._bell.wait()
        while True:
            if at < len(self.events):
                data, at = b"".join(self.events[at:]), len(self.events)
                await exchange.write(data, last=self.done and self.error is None)
            elif self.error is not None:
                raise self.error
            elif self.whole is not None:
                status, body, headers = self.whole
                await exchange.respond(status, body, headers=headers)
                return
            elif self.done:
                return
            else:
                await self._bell.wait()


class KeptAnswers:
    """All of one door."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_key: OrderedDict[tuple[str, str], Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def open(self, tenant: str, key: str, path: str, body: bytes) -> tuple[Kept, bool]:
        """The answer of this key, and whether it is new. Raises IdempotencyConflict, InvalidValue, ConcurrencyLimit."""
        if len(key) > MOST_KEY or not key.isprintable():
            raise InvalidValue(
                f"Idempotency-Key has at most {MOST_KEY} printable characters",
                param="idempotency-key",
            )
        self.sweep()
        digest = hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).digest()
        kept = self._by_key.get((tenant, key))
        if kept is not None:
            if kept.digest != digest:
                raise IdempotencyConflict("this Idempotency-Key was used with another body")
            return kept, False
        held = sum(each.num_bytes for each in self._by_key.values())
        if len(self._by_key) >= MOST_KEPT or held >= MOST_BYTES:
            raise ConcurrencyLimit(
                f"{len(self._by_key)} answers of {held >> 20} MiB are kept for their Idempotency-Keys; try again soon"
            )
        name = "\0".join((tenant, key)).encode()
        kept = self._by_key[tenant, key] = Kept(
            digest=digest,
            identity=hashlib.blake2b(name, key=digest, digest_size=16).digest(),
            tenant=tenant,
            origin=Origin(tenant, key, path, body).packed(),
            arrived=self._clock.now(),
            arrived_wall=int(self._clock.wall()),
            idle_since=self._clock.now(),
        )
        return kept, True

    def find(self, tenant: str, request_id: str) -> Kept | None:
        """By the answer's own id, of the same tenant only."""
        self.sweep()
        for kept in self._by_key.values():
            if kept.request_id == request_id and kept.tenant == tenant:
                return kept
        return None

    def drop(self, kept: Kept) -> None:
        """A failure is not kept: who asks again is served anew."""
        for key in [key for key, each in self._by_key.items() if each is kept]:
            del self._by_key[key]

    def sweep(self) -> None:
        """Forget what was done long ago; give up what nobody reads."""
        now = self._clock.now()
        for kept in list(self._by_key.values()):
            if kept.num_readers or now - kept.idle_since < KEEP_S:
                continue
            if kept.task is not None:
                kept.task.cancel()
            self.drop(kept)

    def seat(self, kept: Kept, change: int) -> None:
        """A reader comes or goes."""
        kept.num_readers += change
        kept.idle_since = self._clock.now()


def place_after(last_event_id: str | None, starting_after: str | None) -> Place | None:
    """Where to go on: `<request>:<choice>:<position>` of a Last-Event-ID header, or a position of choice 0. Raises InvalidValue."""
    if starting_after is not None:
        last_event_id = f":0:{starting_after}"
    if last_event_id is None:
        return None
    _, _, place = last_event_id.rpartition(":")
    choice = last_event_id.rpartition(":")[0].rpartition(":")[2]
    if not (place.isdecimal() and choice.isdecimal() and len(place) < 10 and len(choice) < 10):
        raise InvalidValue(
            "Last-Event-ID is <request>:<choice>:<position>, starting_after a position",
            param="starting_after",
        )
    return int(choice), int(place)


class TokenByToken:
    """Another backend, never more than one token in a Delta. Implements Backend. told: of the one request it will be asked for."""

    def __init__(self, backend: Backend, told: Told | None = None) -> None:
        self._backend = backend
        self._told = told

    async def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See Backend."""
        source = self._backend.generate(submission, told or self._told)
        try:
            async for delta in source:
                for each in _singles(delta):
                    yield each
        finally:
            await source.aclose()

    async def recall(self, stream_id: str) -> Told | None:
        """See Backend."""
        return await self._backend.recall(stream_id)

    def models(self) -> tuple[ServedModel, ...]:
        """See Backend."""
        return self._backend.models()

    def ready(self) -> Readiness:
        """See Backend."""
        return self._backend.ready()

    def explain(self, request_id: str) -> str:
        """See Backend."""
        return self._backend.explain(request_id)


def _singles(delta: Delta) -> Iterable[Delta]:
    last = len(delta.token_ids) - 1
    if last < 1:
        yield delta
        return
    for index, token in enumerate(delta.token_ids):
        yield replace(
            delta,
            position=delta.position + index,
            token_ids=(token,),
            finish_reason=delta.finish_reason if index == last else "",
            logprobs=delta.logprobs[index : index + 1],
            prompt_logprobs=() if index else delta.prompt_logprobs,
        )
