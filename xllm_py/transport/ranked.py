"""A KvTransport over those of all ranks of an instance: every grant is parted into one for each rank of ours and each rank of the peer that
exchange heads (core/kv_plan), and is what has become of all its parts.

Implements base.KvTransport on rank 0, around its own transport and the lines to the other ranks (rank_line). Both sides name the parts alike.
An instance of one rank needs it too, for peers that have several; between two of one rank each, nothing is parted.
"""

from __future__ import annotations

import hashlib
import itertools
import selectors
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.kv_plan import HeadRoute, Share, head_routes
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, KvTransport, TakerGrant
from xllm_py.transport.rank_line import RankLine


@dataclass(slots=True)
class _Whole:
    """A grant, or a probe, and its parts."""

    ranks: dict[bytes, int]  # part -> rank of ours
    open: set[bytes]  # parts that have neither arrived nor failed
    unreleased: set[bytes] = field(default_factory=set)  # taker
    failed: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    exposed_s: float = 0.0

    def add(self, event: KvEvent) -> KvEvent | None:
        """A part has arrived or failed: what that says of the whole, if anything."""
        self.open.discard(event.grant)
        if event.kind is KvEventKind.FAILED:
            news, self.failed = not self.failed, True
            return event if news else None
        self.num_bytes += event.num_bytes
        self.seconds = max(self.seconds, event.seconds)
        self.exposed_s = max(self.exposed_s, event.exposed_s)
        if self.open or self.failed:
            return None
        return replace(
            event, num_bytes=self.num_bytes, seconds=self.seconds, exposed_s=self.exposed_s
        )


class RankedTransport:
    """Implements KvTransport."""

    def __init__(
        self,
        local: KvTransport,
        memory: KvMemory,
        lines: Sequence[RankLine],
        *,
        share: Share,
        streams: range,
    ) -> None:
        """local, memory: of rank 0. lines: to the others, in their order."""
        self._memory = memory
        self._lines = lines
        self._ports: list[KvTransport] = [local, *lines]  # by rank
        self._share = share
        self._streams = itertools.cycle(streams)
        self._wholes: dict[bytes, _Whole] = {}
        self._whole_of: dict[bytes, bytes] = {}  # part -> grant
        self._closed = False
        self._sources = selectors.DefaultSelector()  # itself readable when one of them is
        for port in self._ports:
            self._sources.register(port.wake_fd, selectors.EVENT_READ)

    @property
    def endpoint(self) -> str:
        """See KvTransport; of rank 0."""
        return self._ports[0].endpoint

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._sources.fileno()

    def open_grant(self, grant: TakerGrant) -> int:
        """See KvTransport. Raises ValueError too when the peer's ranks and ours cannot share heads."""
        share = self._share
        routes = head_routes(grant.peer_ranks, share.num_ranks, share.num_heads)
        stream = grant.stream
        if grant.sources and len(routes) > 1:
            stream = next(self._streams)  # the giver has to know, and is told one number
        parts = [
            replace(
                grant,
                grant=part_name(grant.grant, route, len(routes)),
                read_grant=part_name(grant.read_grant, route, len(routes)),
                sources=grant.sources[route.giver_rank : route.giver_rank + 1],
                peer_rank=route.giver_rank,
                stream=stream,
            )
            for route in routes
        ]
        ranks = {part.grant: route.taker_rank for part, route in zip(parts, routes, strict=True)}
        whole = self._note(grant.grant, ranks)
        whole.unreleased = set(ranks)
        opened = [self._ports[ranks[part.grant]].open_grant(part) for part in parts]
        return opened[0]  # of several all have the same

    def _note(self, grant: bytes, ranks: dict[bytes, int]) -> _Whole:
        whole = self._wholes[grant] = _Whole(ranks, open=set(ranks))
        self._whole_of |= dict.fromkeys(ranks, grant)
        return whole

    def _forget(self, grant: bytes) -> None:
        for part in self._wholes.pop(grant).ranks:
            del self._whole_of[part]

    def revoke(self, grant: bytes) -> None:
        """See KvTransport."""
        for part, rank in self._parts(grant) or [(grant, 0)]:
            self._ports[rank].revoke(part)

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        for rank, part in self._parted(grant, self._routes_to(grant)):
            self._ports[rank].connect(part)

    def probe(self, probe: GiverGrant, num_bytes: int, *, fetch: bool = False) -> None:
        """See KvTransport: on every way that blocks take, of which the slowest counts."""
        routes = self._routes_from(probe) if fetch else self._routes_to(probe)
        for rank, part in self._parted(probe, routes):
            self._ports[rank].probe(part, num_bytes, fetch=fetch)

    def _routes_to(self, peer: GiverGrant) -> list[tuple[HeadRoute, int, int]]:
        """(route, rank of ours, of the peer's)."""
        share = self._share
        routes = head_routes(share.num_ranks, peer.peer_ranks, share.num_heads)
        return [(route, route.giver_rank, route.taker_rank) for route in routes]

    def _routes_from(self, peer: GiverGrant) -> list[tuple[HeadRoute, int, int]]:
        share = self._share
        routes = head_routes(peer.peer_ranks, share.num_ranks, share.num_heads)
        return [(route, route.taker_rank, route.giver_rank) for route in routes]

    def _parted(
        self, grant: GiverGrant, routes: Sequence[tuple[HeadRoute, int, int]]
    ) -> list[tuple[int, GiverGrant]]:
        """(rank of ours, its part); noted."""
        parted = [
            (
                ours,
                replace(
                    grant,
                    grant=part_name(grant.grant, route, len(routes)),
                    read_grant=part_name(grant.read_grant, route, len(routes)),
                    endpoints=grant.endpoints[theirs : theirs + 1],
                    peer_rank=theirs,
                ),
            )
            for route, ours, theirs in routes
        ]
        self._note(grant.grant, {part.grant: rank for rank, part in parted})
        return parted

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """See KvTransport."""
        for part, rank in self._parts(grant):
            self._ports[rank].push(part, layer, first_relative, block_ids)

    def _parts(self, grant: bytes) -> list[tuple[bytes, int]]:
        whole = self._wholes.get(grant)
        return list(whole.ranks.items()) if whole is not None else []

    def commit(self, grant: bytes) -> None:
        """See KvTransport."""
        for part, rank in self._parts(grant):
            self._ports[rank].commit(part)

    def abandon(self, grant: bytes) -> None:
        """See KvTransport: every rank has let go when this returns."""
        for part, rank in self._parts(grant):
            self._ports[rank].abandon(part)
        if grant in self._wholes:
            self._forget(grant)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Of every rank (core.kv_memory.KvMemory.poison)."""
        self._memory.poison(block_ids)
        for line in self._lines:
            line.poison(block_ids)

    def poll(self) -> list[KvEvent]:
        """See KvTransport."""
        told = [event for port in self._ports for event in port.poll()]
        events = [self._whole_event(event) for event in told]
        return [event for event in events if event is not None]

    def _whole_event(self, event: KvEvent) -> KvEvent | None:
        """What an event of a part says of the whole, if anything."""
        grant = self._whole_of.get(event.grant)
        if grant is None:
            return event  # of a grant that nobody opened
        whole = self._wholes[grant]
        match event.kind:
            case KvEventKind.RECEIVING:
                return replace(event, grant=grant)
            case KvEventKind.RELEASED:
                whole.unreleased.discard(event.grant)
                if whole.unreleased:
                    return None
                self._forget(grant)
                return replace(event, grant=grant)
        news = whole.add(event)
        if not whole.open and not whole.unreleased:
            self._forget(grant)
        return replace(news, grant=grant) if news is not None else None

    def ledger(self) -> dict[str, int]:
        """See KvTransport; of all ranks."""
        total: Counter[str] = Counter()
        for port in self._ports:
            total.update(port.ledger())
        return dict(total)

    def close(self) -> None:
        """See KvTransport."""
        if self._closed:
            return
        self._closed = True
        self._sources.close()
        for port in self._ports:
            port.close()


def part_name(grant: bytes, route: HeadRoute, num_routes: int) -> bytes:
    """As unguessable as the grant, 16 bytes; the grant itself where it has one part, nothing where there is none."""
    if num_routes == 1 or not grant:
        return grant
    between = b"%d %d" % (route.giver_rank, route.taker_rank)
    return hashlib.blake2b(between, digest_size=len(grant), key=grant).digest()
