"""The KvTransport protocol: moves granted blocks between two engines and knows nothing of requests.

One object per engine serves both directions: as giver it connects to a peer's listener and pushes blocks under a grant;
as taker it listens, opens grants and writes what arrives into the blocks a grant names. All work is done by the transport's
own I/O threads; every method here returns at once, and what happened is told by `poll`. The engine loop owns the object and
calls it from one thread only, except `push`, which the executor's layer hook calls from that same thread in mid-step.

Conformance: tests/conformance/test_kv_transport.py, run against every implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from xllm_py.wire.kv_handshake import Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class TakerGrant:
    """D's side of a grant: where its bytes may go and what must be true at COMMIT."""

    grant: bytes  # 16 random bytes
    peer_incarnation: str  # the only peer that may use it
    block_size: int  # tokens of the blocks below, ours or a part of ours (KvMemory.at)
    block_ids: tuple[int, ...]  # relative block i is block_ids[i]
    first_wanted: int  # relative blocks before this one are already held and must not be written
    prompt_digest: bytes  # base.hashing.prompt_digest of the prompt, 16 bytes
    # host:port of each KV listener of the giver: connect there and fetch; none: the giver connects and pushes
    sources: tuple[str, ...] = ()
    read_grant: bytes = b""  # what allows that: 16 random bytes of the giver's
    peer_rank: int = 0  # of the peer's ranks, which one
    peer_ranks: int = 1  # how many it has
    stream: int | None = None  # over which of our links to fetch; None: the one with the fewest

    @property
    def peer(self) -> Peer:
        """The rank that it is about."""
        return Peer(self.peer_incarnation, self.peer_rank, self.peer_ranks)

    @property
    def source(self) -> str:
        """The only listener, or none."""
        return self.sources[0] if self.sources else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiverGrant:
    """P's side of a grant."""

    grant: bytes
    endpoints: tuple[str, ...]  # host:port of each KV listener of the peer; none when it fetches
    peer_incarnation: str
    block_size: int  # tokens of the blocks that are pushed, ours or a part of ours: the smaller one of both sides
    prompt_digest: bytes
    read_grant: bytes = b""  # our word that the peer may read, 16 random bytes: nothing is sent before it fetches. Empty: push
    stream: int = 0  # over which of its links it fetches
    peer_rank: int = 0  # of the peer's ranks, which one
    peer_ranks: int = 1  # how many it has

    @property
    def peer(self) -> Peer:
        """The rank that it is about."""
        return Peer(self.peer_incarnation, self.peer_rank, self.peer_ranks)

    @property
    def endpoint(self) -> str:
        """The only listener, or none."""
        return self.endpoints[0] if self.endpoints else ""


class KvEventKind(Enum):
    """What `poll` can tell."""

    RECEIVING = "receiving"  # taker: blocks keep coming; told about once a second
    LANDED = "landed"  # taker: COMMIT verified, every wanted block is in place
    ACKNOWLEDGED = "acknowledged"  # giver: the peer said LANDED; of a probe, for who asked for it: it has arrived
    FAILED = "failed"  # either side: this grant is dead; `text` says why
    RELEASED = "released"  # taker: after `revoke`, nothing can be written under the grant any more


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvent:
    """Something happened to a grant."""

    kind: KvEventKind
    grant: bytes
    text: str = ""
    num_bytes: int = 0  # payload moved under the grant (LANDED, ACKNOWLEDGED)
    seconds: float = 0.0  # from the first byte to the end (LANDED, ACKNOWLEDGED)
    exposed_s: float = 0.0  # from `commit` to its answer: what no computation hid (ACKNOWLEDGED)


class KvTransport(Protocol):
    """See the module's text; docs/decisions/0016 says why it has these verbs."""

    @property
    def endpoint(self) -> str:
        """host:port of this side's listener; empty when it only gives."""
        ...

    @property
    def wake_fd(self) -> int:
        """A file descriptor that becomes readable when `poll` has something to tell."""
        ...

    def open_grant(self, grant: TakerGrant) -> int:
        """Taker: from now on the named peer may write the named blocks; with a `source` they are fetched from there, over the stream
        that is returned. Raises ValueError for a block size that is no part of ours.
        """
        ...

    def revoke(self, grant: bytes) -> None:
        """Taker: take the grant back. RELEASED follows (at once, or after the frame in flight); only then are its
        blocks free. Also called after LANDED to forget the grant; then RELEASED follows too. Unknown grants: RELEASED.
        """
        ...

    def connect(self, grant: GiverGrant) -> None:
        """Giver: open (or share) the link to the peer and make the grant known to it. Failure comes by `poll`."""
        ...

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """Giver: send K and V of these local blocks, counted in the grant's size, as relative blocks first_relative... The blocks must not change or
        be freed until ACKNOWLEDGED, FAILED or `abandon`.
        """
        ...

    def commit(self, grant: bytes) -> None:
        """Giver: everything has been pushed; ask the peer to verify. ACKNOWLEDGED or FAILED follows."""
        ...

    def probe(self, probe: GiverGrant, num_bytes: int, *, fetch: bool = False) -> None:
        """Giver: send so many bytes (at most 4 MiB) that are checked and thrown away there, on the way that blocks take.
        fetch: taker: have the peer send them to us, on the way that fetched blocks take.

        `probe.grant` is a name of 16 random bytes, no grant of the peer. ACKNOWLEDGED (`seconds` is the round trip) or FAILED
        follows.
        """
        ...

    def abandon(self, grant: bytes) -> None:
        """Giver: stop sending and forget the grant. When this returns no byte of its blocks is read any more."""
        ...

    def poll(self) -> list[KvEvent]:
        """What happened since the last call; never blocks."""
        ...

    def ledger(self) -> dict[str, int]:
        """Counts for the ledger and metrics: grants_open, links, bytes_sent, bytes_received, frames_rejected, failures."""
        ...

    def close(self) -> None:
        """Close listener and links, end the threads; idempotent."""
        ...
