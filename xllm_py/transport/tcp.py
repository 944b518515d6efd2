"""KvTransport over TCP: one object per engine, giver and taker at once.

Made by engine/__main__ and used by engine/handoff_agent from the engine's thread; the bytes move in threads of their own
(tcp_giver: one per peer we give to; tcp_taker: a listener, and one per peer that gives to us). What moves is decided by the
grants alone; nothing here knows requests. A peer that fetches (PULL) connects to the giver's listener: tcp_fetching and tcp_callers.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from xllm_py.base import log
from xllm_py.base.clock import Clock, RealClock
from xllm_py.base.errors import LayoutMismatch, PortInUse, UsageError
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.transport import shm, tcp_handshake, tcp_listener
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.fabric import Fabric
from xllm_py.transport.kv_events import Counts, EventQueue
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_accepted import Host
from xllm_py.transport.tcp_callers import Awaited, Callers
from xllm_py.transport.tcp_fetching import FetchLink
from xllm_py.transport.tcp_giver import GiverLink
from xllm_py.transport.tcp_handshake import GiverEnd, Hold, Pause, Way
from xllm_py.transport.tcp_listener import Listener
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec
from xllm_py.wire.kv_handshake import Identity, Peer
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession

_log = log.get(__name__)

MIN_KEY_BYTES = 16
# givers to which the way was lost, and that hear later what nobody waits for any more
MAX_LEFT = 64
_COUNTS = (
    "bytes_sent",
    "bytes_received",
    "frames_rejected",
    "frames_late",
    "links_broken",
    "failures",
)

Link = TypeVar("Link", GiverLink, FetchLink)
Place = tuple[str, Peer, int]  # endpoint ("" when the peer fetches), who it is, stream


class TcpKvTransport:
    """Implements transport.base.KvTransport."""

    def __init__(  # noqa: PLR0913  every one of them is a fact of the engine's configuration
        self,
        *,
        memory: KvMemory,
        incarnation: str,
        cluster_key: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        listen: bool = True,
        port_may_move: bool = False,
        num_streams: int = 1,
        first_stream: int = 0,
        tls: KvTls | None = None,
        shared_memory: bool = False,
        fabric: Fabric | None = None,
        share: Share | None = None,
        clock: Clock | None = None,
    ) -> None:
        """port 0: any free port. port_may_move: take the next free one when `port` is busy. num_streams: links to one peer, numbered from first_stream; an incarnation has
        each number once.
        shared_memory, fabric: peers, of this host or at all, that want it too get their payloads through it.
        share: whose heads `memory` holds; None: of an instance of one rank.

        Raises PortInUse, UsageError when the cluster key is missing, LayoutMismatch when a block exceeds a frame.
        """
        layout = memory.layout
        if len(cluster_key) < MIN_KEY_BYTES:
            raise UsageError("the KV link needs a cluster key of at least 16 bytes")
        if layout.block_bytes > codec.MAX_PAYLOAD_BYTES:
            raise LayoutMismatch(
                "one KV block of one layer exceeds 4 MiB; use a smaller --block_size"
            )
        self._share = share or Share(num_heads=layout.num_heads)
        self._memory = memory
        self._incarnation = incarnation
        self._cluster_key = cluster_key
        self._clock = clock or RealClock()
        self._counts = Counts(*_COUNTS)
        self._events = EventQueue()
        self._streams = range(first_stream, first_stream + num_streams)
        self._tls = tls
        self._fabric = fabric
        self._shared = shared_memory and shm.supported()
        self._lock = threading.Lock()  # guards the next two: the listener's threads add links too
        self._closed = False
        self._links: dict[Place, GiverLink] = {}
        self._fetchers: dict[Place, FetchLink] = {}
        self._left: OrderedDict[Place, dict[bytes, bytes]] = OrderedDict()  # by those that ended
        self._callers = Callers(self._clock)
        self._by_grant: dict[bytes, GiverLink] = {}
        self._taking = Taking(memory=memory, events=self._events, counts=self._counts)
        self._listener: Listener | None = None
        self._endpoint = ""
        if listen:
            self._listen(host, port, port_may_move)

    def _listen(self, host: str, port: int, may_move: bool) -> None:
        try:
            sock = tcp_listener.bind(host, port, may_move)
        except PortInUse:
            self._events.wake.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self._endpoint = f"{shown}:{sock.getsockname()[1]}"
        socks = [sock]
        if self._shared:
            socks.append(tcp_listener.bind_here(sock.getsockname()[1], self._incarnation))
        shared = Host(
            make_identity=self._identity,
            taking=self._taking,
            callers=self._callers,
            on_call=self._on_call,
            clock=self._clock,
            tls=self._tls,
            fabric=self._fabric,
        )
        self._listener = Listener(socks, shared)

    def _identity(self, stream: int = 0, block_size: int = 0) -> Identity:
        layout = self._memory.layout
        return Identity(
            stream=stream,
            incarnation=self._incarnation,
            layout=layout.at(block_size) if block_size else layout,
            share=self._share,
            cluster_key=self._cluster_key,
            nonce=secrets.token_bytes(codec.NONCE_BYTES),
            payloads=codec.Payloads.SOCKET if self._fabric is None else self._fabric.payloads,
        )

    @property
    def endpoint(self) -> str:
        """See KvTransport."""
        return self._endpoint

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._events.wake.fd

    def open_grant(self, grant: TakerGrant) -> int:
        """See KvTransport. Raises IndexError for blocks outside the cache, ValueError for a grant opened before."""
        self._taking.open(grant)
        if not grant.source:
            return 0
        place = self._place(self._fetchers, grant.source, grant.peer)
        if grant.stream is not None:
            place = (*place[:2], grant.stream)
        try:
            self._ask(
                place, grant.block_size, lambda link: link.fetch(grant.grant, grant.read_grant)
            )
        except (OSError, RuntimeError) as error:
            self._taking.fetching_failed([grant.grant], [], f"no KV link can be made: {error}")
        return place[2]

    def revoke(self, grant: bytes) -> None:
        """See KvTransport."""
        self._taking.revoke(grant)

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        self._assign(grant, 0)

    def probe(self, probe: GiverGrant, num_bytes: int, *, fetch: bool = False) -> None:
        """See KvTransport."""
        if not fetch:
            self._assign(probe, num_bytes)
            return
        place = self._place(self._fetchers, probe.endpoint, probe.peer)
        try:
            self._ask(place, probe.block_size, lambda link: link.probe(probe.grant, num_bytes))
        except (OSError, RuntimeError) as error:
            self._taking.fetching_failed([], [probe.grant], f"no KV link can be made: {error}")

    def _ask(self, place: Place, block_size: int, ask: Callable[[FetchLink], bool]) -> None:
        """Over a link to this giver, a new one when there is none or it has ended. Raises OSError, RuntimeError."""
        link = self._fetchers.get(place)
        if link is not None and ask(link):
            return
        self._sweep()
        endpoint, peer, stream = place
        link = FetchLink(
            way=self._way(endpoint, peer),
            peer=peer.name,
            make_session=lambda: TakerSession(
                self._identity(stream, block_size), self._taking.grants, calls=peer
            ),
            taking=self._taking,
            clock=self._clock,
            wanted=self._left.pop(place, {}),
        )
        ask(link)
        link.start()
        self._fetchers[place] = link

    def _assign(self, grant: GiverGrant, probe_bytes: int) -> None:
        """To a link of its peer, a new one when there is none or it has ended."""
        place = ("", grant.peer, grant.stream)
        if not grant.read_grant:
            place = self._place(self._links, grant.endpoint, grant.peer)
        self._sweep()
        with self._lock:
            link = self._links.get(place)
            if link is None or not link.add(grant, probe_bytes):
                try:
                    link = self._open_link(place, grant.block_size)
                    link.add(grant, probe_bytes)
                    link.start()
                except (OSError, RuntimeError) as error:  # no descriptor, no thread
                    self._fail(grant.grant, f"no KV link can be made: {error}")
                    return
                self._links[place] = link
            self._by_grant[grant.grant] = link

    def _on_call(self, session: GiverSession) -> None:
        """A listener's thread: a taker has called. Its link serves it from now on, before there is a grant for it too."""
        place = ("", session.peer, session.place[1])
        with self._lock:
            link = self._links.get(place)
            if self._closed or (link is not None and link.expect_call()):
                return
            if link is not None:
                link.close()
                del self._links[place]
            try:
                link = self._open_link(place, session.block_size)
                link.start()
            except (OSError, RuntimeError) as error:
                _log.warning("no KV link can be made", peer=session.place[0], reason=str(error))
                return
            self._links[place] = link

    def _place(self, links: dict[Place, Link], endpoint: str, peer: Peer) -> Place:
        """All frames of a grant go over one link, the one with the fewest grants; a further one is opened when all are busy."""
        found = [links.get((endpoint, peer, stream)) for stream in self._streams]
        loads = [len(link) if link is not None else 0 for link in found]
        return endpoint, peer, self._streams[loads.index(min(loads))]

    def _fail(self, grant: bytes, text: str) -> None:
        self._counts.add("failures")
        _log.warning("KV link failed", reason=text)
        self._events.put(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=text))

    def _sweep(self) -> None:
        """Give back what ended links still hold."""
        with self._lock:
            _close_ended(self._links)
        for place, link in self._fetchers.items():
            if link.ended and link.left:
                self._left[place] = link.left
        while len(self._left) > MAX_LEFT:
            self._left.popitem(last=False)
        _close_ended(self._fetchers)

    def _way(self, endpoint: str, peer: Peer) -> Way:
        shared = peer.incarnation if self._shared else ""
        return Way(endpoint=endpoint, tls=self._tls, fabric=self._fabric, shared=shared)

    def _open_link(self, place: Place, block_size: int) -> GiverLink:
        endpoint, peer, stream = place

        def shake(sock: socket.socket) -> GiverEnd:
            session = GiverSession(self._identity(stream, block_size), peer)
            return tcp_handshake.as_giver(sock, session, clock=self._clock, fabric=self._fabric)

        def dial(hold: Hold, pause: Pause, again: bool) -> GiverEnd:
            return tcp_handshake.dial(
                self._way(endpoint, peer),
                shake,
                clock=self._clock,
                hold=hold,
                pause=pause,
                again=again,
            )

        return GiverLink(
            peer=endpoint or peer.name,
            opening=dial if endpoint else Awaited(self._callers, (peer.name, stream)),
            memory=self._memory_for(peer, block_size),
            events=self._events,
            counts=self._counts,
            clock=self._clock,
        )

    def _memory_for(self, peer: Peer, block_size: int) -> KvMemory:
        """What we give to it; where that is nothing, the handshake refuses."""
        memory, route = self._memory.at(block_size), self._share.route_to(peer.rank, peer.num_ranks)
        return memory.heads(route.source, route.count) if route is not None else memory

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """See KvTransport. Raises IndexError for blocks outside the cache."""
        link = self._by_grant.get(grant)
        if link is not None and block_ids:
            link.memory.check(layer, block_ids)
            link.push(grant, layer, first_relative, block_ids)

    def commit(self, grant: bytes) -> None:
        """See KvTransport."""
        link = self._by_grant.get(grant)
        if link is not None:
            link.commit(grant)

    def abandon(self, grant: bytes) -> None:
        """See KvTransport."""
        link = self._by_grant.pop(grant, None)
        if link is not None:
            link.abandon(grant)

    def poll(self) -> list[KvEvent]:
        """See KvTransport."""
        events = self._events.take()
        for event in events:
            if event.kind in (KvEventKind.ACKNOWLEDGED, KvEventKind.FAILED):
                self._by_grant.pop(event.grant, None)
        if any(event.kind is KvEventKind.FAILED for event in events):
            self._sweep()
        return events

    def _made(self) -> list[GiverLink | FetchLink]:
        with self._lock:
            return [*self._links.values(), *self._fetchers.values()]

    def ledger(self) -> dict[str, int]:
        """See KvTransport."""
        given = sum(not link.ended for link in self._made())
        taken = self._listener.num_links if self._listener is not None else 0
        with self._taking.lock:
            opened = len(self._taking.grants)
        return {
            "grants_open": opened,
            "grants_given": len(self._by_grant),
            "links": given + taken + len(self._callers),
            **self._counts.read(),
        }

    def close(self) -> None:
        """See KvTransport."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for link in self._made():
            link.close()
        if self._listener is not None:
            self._listener.close()
        self._callers.close()
        self._links.clear()
        self._fetchers.clear()
        self._by_grant.clear()
        self._events.wake.close()


def _close_ended(links: dict[Place, Link]) -> None:
    for place, link in list(links.items()):
        if link.ended:
            link.close()
            del links[place]
