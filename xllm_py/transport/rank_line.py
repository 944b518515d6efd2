"""What rank 0 of an instance tells the KV transport of another rank, and what that answers: messages, and the ends of the line between them.

Rank 0 alone decides what is handed over (transport/ranked); the bytes go from rank to rank. The others obey (transport/rank_servant).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_py.base.clock import Clock
from xllm_py.base.errors import EngineDied, PeerUnavailable
from xllm_py.transport.base import GiverGrant, KvEvent, TakerGrant
from xllm_py.transport.pipe import BlockingPipe, Table

ANSWER_S = 15.0  # longer than a transport takes to cut a link that does not let go of its blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """See KvTransport.open_grant."""

    grant: TakerGrant


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """See KvTransport.revoke."""

    grant: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """See KvTransport.connect."""

    grant: GiverGrant


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """See KvTransport.push; once the rank itself has stored this layer of this step."""

    grant: bytes
    layer: int
    first: int
    block_ids: tuple[int, ...]
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """See KvTransport.commit."""

    grant: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """See KvTransport.probe."""

    probe: GiverGrant
    num_bytes: int
    fetch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Something that has to be done before rank 0 goes on: grants to abandon, blocks to poison. Done follows, with the counts."""

    call: int
    abandon: tuple[bytes, ...] = ()
    poison: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The first word of a rank: where its KV port is reached."""

    rank: int
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """See KvTransport.poll."""

    events: list[KvEvent]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Answer to Ask; counts as of KvTransport.ledger."""

    call: int
    counts: dict[str, int] = field(default_factory=dict)


Order = Open | Revoke | Connect | Push | Commit | Probe | Ask
_ORDERS = (Open, Revoke, Connect, Push, Commit, Probe, Ask)
_WORDS = (Joined, Happened, Done)


def servant_pipe(sock: socket.socket) -> BlockingPipe:
    """The other rank's end."""
    return BlockingPipe(sock, Table(_WORDS, _ORDERS), "rank 0")


class RankLine:
    """Rank 0's end: another rank's KvTransport, as it is used from here. Every method raises EngineDied when the rank is gone: then the instance
    ends, and why is said elsewhere too.
    """

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        """Waits for the rank's first word."""
        self._pipe = BlockingPipe(sock, Table(_ORDERS, _WORDS), "another rank")
        self._clock = clock
        self._calls = 0
        self._events: list[KvEvent] = []
        self._done: dict[int, dict[str, int]] = {}
        self.step = 0  # number of the plan that the rank was told last
        self.rank, self.endpoint = 0, ""
        deadline = clock.now() + ANSWER_S
        while not self.rank:
            self._wait(deadline)

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._pipe.fileno()

    def open_grant(self, grant: TakerGrant) -> int:
        """See KvTransport; the stream is the one that the grant names."""
        self._send(Open(grant=grant))
        return grant.stream or 0

    def revoke(self, grant: bytes) -> None:
        """See KvTransport."""
        self._send(Revoke(grant=grant))

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        self._send(Connect(grant=grant))

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """See KvTransport."""
        self._send(
            Push(
                grant=grant,
                layer=layer,
                first=first_relative,
                block_ids=block_ids,
                step=self.step,
            )
        )

    def commit(self, grant: bytes) -> None:
        """See KvTransport."""
        self._send(Commit(grant=grant))

    def probe(self, probe: GiverGrant, num_bytes: int, *, fetch: bool = False) -> None:
        """See KvTransport."""
        self._send(Probe(probe=probe, num_bytes=num_bytes, fetch=fetch))

    def abandon(self, grant: bytes) -> None:
        """See KvTransport: the rank has let go when this returns."""
        self._ask(abandon=(grant,))

    def poison(self, block_ids: Sequence[int]) -> None:
        """Of its cache (core.kv_memory.KvMemory.poison), before this returns."""
        self._ask(poison=tuple(block_ids))

    def ledger(self) -> dict[str, int]:
        """See KvTransport."""
        return self._ask()

    def poll(self) -> list[KvEvent]:
        """See KvTransport."""
        while select.select([self._pipe], [], [], 0)[0]:
            self._read()
        events, self._events = self._events, []
        return events

    def _send(self, order: Order) -> None:
        try:
            self._pipe.send(order)
        except PeerUnavailable as error:
            raise EngineDied(f"rank {self.rank}: {error.message}") from error

    def _ask(
        self, *, abandon: tuple[bytes, ...] = (), poison: tuple[int, ...] = ()
    ) -> dict[str, int]:
        """Have it done when this returns; its counts."""
        self._calls += 1
        self._send(Ask(call=self._calls, abandon=abandon, poison=poison))
        deadline = self._clock.now() + ANSWER_S
        while self._calls not in self._done:
            self._wait(deadline)
        return self._done.pop(self._calls)

    def _wait(self, deadline: float) -> None:
        left_s = deadline - self._clock.now()
        if left_s <= 0 or not select.select([self._pipe], [], [], left_s)[0]:
            raise EngineDied(f"rank {self.rank} does not answer")
        self._read()

    def _read(self) -> None:
        try:
            words = self._pipe.receive()
        except PeerUnavailable as error:
            raise EngineDied(f"rank {self.rank}: {error.message}") from error
        for word in words:
            match word:
                case Joined(rank=rank, endpoint=endpoint):
                    self.rank, self.endpoint = rank, endpoint
                case Happened(events=events):
                    self._events += events
                case Done(call=call, counts=counts):
                    self._done[call] = counts

    def close(self) -> None:
        """See KvTransport: the rank hears of it."""
        self._pipe.close()
