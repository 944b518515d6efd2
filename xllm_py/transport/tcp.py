"""KvTransport over TCP: one object per engine, giver and taker at once.

Made by engine/__main__ and used by engine/handoff_agent from the engine's thread; the bytes move in threads of their own
(tcp_giver: one per peer we give to; tcp_taker: a listener, and one per peer that gives to us). What moves is decided by the
grants alone; nothing here knows requests.
"""

from __future__ import annotations

import errno
import secrets
import socket

from xllm_py.base import log
from xllm_py.base.clock import Clock, RealClock
from xllm_py.base.errors import LayoutMismatch, PortInUse, UsageError
from xllm_py.base.ports import port_taken
from xllm_py.core.kv_memory import KvMemory
from xllm_py.transport import shm
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.kv_events import Counts, EventQueue
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_giver import GiverLink
from xllm_py.transport.tcp_handshake import Way
from xllm_py.transport.tcp_listener import Listener
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec
from xllm_py.wire.kv_handshake import Identity
from xllm_py.wire.kv_session import GiverSession

_log = log.get(__name__)

_BACKLOG = 128
_PORTS_TO_TRY = 1000
MIN_KEY_BYTES = 16


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
        tls: KvTls | None = None,
        shared_memory: bool = False,
        layout_fingerprint: str = "",
        clock: Clock | None = None,
    ) -> None:
        """port 0: any free port. port_may_move: take the next free one when `port` is busy. num_streams: links to one peer.
        shared_memory: peers of this host that want it too get their payloads through it.

        Raises PortInUse, UsageError when the cluster key is missing, LayoutMismatch when a block exceeds a frame or
        `layout_fingerprint` is not that of `memory`.
        """
        layout = memory.layout
        if len(cluster_key) < MIN_KEY_BYTES:
            raise UsageError("the KV link needs a cluster key of at least 16 bytes")
        if layout.block_bytes > codec.MAX_PAYLOAD_BYTES:
            raise LayoutMismatch(
                "one KV block of one layer exceeds 4 MiB; use a smaller --block_size"
            )
        if layout_fingerprint not in ("", layout.fingerprint):
            raise LayoutMismatch("the announced KV layout is not that of the cache")
        self._memory = memory
        self._incarnation = incarnation
        self._cluster_key = cluster_key
        self._clock = clock or RealClock()
        self._counts = Counts(
            "bytes_sent",
            "bytes_received",
            "frames_rejected",
            "frames_late",
            "links_broken",
            "failures",
        )
        self._events = EventQueue()
        self._num_streams = num_streams
        self._tls = tls
        self._shared = shared_memory and shm.supported()
        self._links: dict[tuple[str, str, int], GiverLink] = {}
        self._by_grant: dict[bytes, GiverLink] = {}
        self._taking = Taking(memory=memory, events=self._events, counts=self._counts)
        self._listener: Listener | None = None
        self._endpoint = ""
        self._closed = False
        if listen:
            self._listen(host, port, port_may_move)

    def _listen(self, host: str, port: int, may_move: bool) -> None:
        try:
            sock = _bind(host, port, may_move)
        except PortInUse:
            self._events.wake.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self._endpoint = f"{shown}:{sock.getsockname()[1]}"
        socks = [sock]
        if self._shared:
            socks.append(_bind_here(sock.getsockname()[1], self._incarnation))
        self._listener = Listener(
            socks=socks,
            taking=self._taking,
            make_identity=self._identity,
            clock=self._clock,
            tls=self._tls,
        )

    def _identity(self, stream: int = 0, block_size: int = 0) -> Identity:
        layout = self._memory.layout
        return Identity(
            stream=stream,
            incarnation=self._incarnation,
            layout=layout.at(block_size) if block_size else layout,
            cluster_key=self._cluster_key,
            nonce=secrets.token_bytes(codec.NONCE_BYTES),
        )

    @property
    def endpoint(self) -> str:
        """See KvTransport."""
        return self._endpoint

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._events.wake.fd

    def open_grant(self, grant: TakerGrant) -> None:
        """See KvTransport. Raises IndexError for blocks outside the cache, ValueError for a grant opened before."""
        self._taking.open(grant)

    def revoke(self, grant: bytes) -> None:
        """See KvTransport."""
        self._taking.revoke(grant)

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        self._assign(grant, 0)

    def probe(self, probe: GiverGrant, num_bytes: int) -> None:
        """See KvTransport."""
        self._assign(probe, num_bytes)

    def _assign(self, grant: GiverGrant, probe_bytes: int) -> None:
        """To a link of its peer, a new one when there is none or it has ended."""
        place = (grant.endpoint, grant.peer_incarnation, self._stream_for(grant))
        link = self._links.get(place)
        if link is None or not link.add(grant, probe_bytes):
            self._sweep()
            try:
                link = self._open_link(grant, place[2])
                link.add(grant, probe_bytes)
                link.start()
            except (OSError, RuntimeError) as error:  # no descriptor, no thread
                self._fail(grant.grant, f"no KV link can be made: {error}")
                return
            self._links[place] = link
        self._by_grant[grant.grant] = link

    def _stream_for(self, grant: GiverGrant) -> int:
        """All frames of a grant go over one link, the one with the fewest grants; a further one is opened when all are busy."""
        peer = (grant.endpoint, grant.peer_incarnation)
        links = [self._links.get((*peer, stream)) for stream in range(self._num_streams)]
        loads = [len(link) if link is not None else 0 for link in links]
        return loads.index(min(loads))

    def _fail(self, grant: bytes, text: str) -> None:
        self._counts.add("failures")
        _log.warning("KV link failed", reason=text)
        self._events.put(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=text))

    def _sweep(self) -> None:
        """Give back what ended links still hold."""
        for key, link in list(self._links.items()):
            if link.ended:
                link.close()
                del self._links[key]

    def _open_link(self, peer: GiverGrant, stream: int) -> GiverLink:
        return GiverLink(
            way=Way(
                endpoint=peer.endpoint,
                tls=self._tls,
                shared=peer.peer_incarnation if self._shared else "",
            ),
            make_session=lambda: GiverSession(
                self._identity(stream, peer.block_size), peer.peer_incarnation
            ),
            memory=self._memory.at(peer.block_size),
            events=self._events,
            counts=self._counts,
            clock=self._clock,
        )

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

    def ledger(self) -> dict[str, int]:
        """See KvTransport."""
        given = sum(not link.ended for link in self._links.values())
        taken = self._listener.num_links if self._listener is not None else 0
        with self._taking.lock:
            opened = len(self._taking.grants)
        return {
            "grants_open": opened,
            "grants_given": len(self._by_grant),
            "links": given + taken,
            **self._counts.read(),
        }

    def close(self) -> None:
        """See KvTransport."""
        if self._closed:
            return
        self._closed = True
        for link in self._links.values():
            link.close()
        if self._listener is not None:
            self._listener.close()
        self._links.clear()
        self._by_grant.clear()
        self._events.wake.close()


def _bind_here(port: int, incarnation: str) -> socket.socket:
    """The Unix socket over which peers of this host hand their shared memory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(shm.address_of(port, incarnation))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise PortInUse(f"no Unix socket for shared memory: {error.strerror}") from error
    return sock


def _bind(host: str, port: int, may_move: bool) -> socket.socket:
    """A listening socket on `port`, or on the next free one. Raises PortInUse."""
    tries = _PORTS_TO_TRY if may_move and port else 1
    for candidate in range(port, min(port + tries, 65536)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, candidate))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise PortInUse(
                    f"cannot listen for KV on {host}:{candidate}: {error.strerror}"
                ) from error
            continue
        if candidate != port and port:
            _log.warning("KV port is taken, moved on", port=port, took=candidate)
        return sock
    raise port_taken(port, "--transfer_listen_port")
