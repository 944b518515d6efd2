"""P's end of one KV link over TCP: a thread that sends what the engine thread queues.

Shared by many grants to one peer. The engine thread queues (grant, layer, blocks) and goes on; this thread computes the checksums and
hands the cache's own memory, or small pieces of it by way of transport/stage, to the kernel. Made by transport/tcp. It connects to the
taker, or is called by it (PULL; tcp_callers). When a connection breaks another one is made, and the grants go on (kv_giving).
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterable

from xllm_py.base import failpoints, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import InternalError
from xllm_py.core.kv_memory import KvMemory
from xllm_py.transport import tcp_socket
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind
from xllm_py.transport.kv_events import Counts, EventQueue, Wake
from xllm_py.transport.kv_giving import Giving, Givings, Item, frames_of
from xllm_py.transport.payload_ring import PayloadWriter
from xllm_py.transport.stage import Stage
from xllm_py.transport.tcp_handshake import GiverEnd, Hold, Pause
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import FrameType

ACK_S = 1.0  # a verified COMMIT is answered in microseconds; after so long the peer is asked again over a new connection
ABANDON_S = 0.5  # how long `abandon` lets the thread come out of the kernel before it cuts the link
BATCH_BYTES = codec.FRAME_BYTES  # frames that wait go out in one call, up to about so many bytes
CUT_S = 10.0  # the kernel returns from a cut link at once; only a machine that starves the thread makes this last
_IDLE_MS = 250

_log = log.get(__name__)
_Frame = tuple[
    bytes, list[memoryview], int
]  # header, payload where it goes over the socket, the payload's bytes


class GiverLink:
    """See the module's text. Public methods are the engine thread's; all else is the link's thread."""

    def __init__(
        self,
        *,
        peer: str,
        opening: Callable[[Hold, Pause, bool], GiverEnd],
        memory: KvMemory,
        events: EventQueue,
        counts: Counts,
        clock: Clock,
    ) -> None:
        """peer: what to call it in logs. opening: gives a connection, or another one after one that broke; or raises LinkBroken."""
        self._peer = peer
        self._opening = opening
        self.memory = memory
        self._stage = Stage(memory)
        self._events = events
        self._counts = counts
        self._clock = clock
        self._state = threading.Condition()  # guards everything down to _ended
        self._givings = Givings()
        self._reading: set[bytes] = set()  # grants whose blocks the thread may be reading
        self._idle = False
        self._sock: socket.socket | None = None
        self._called = False  # a taker's call is for us
        self._closing = False
        self._ended = False
        self._wake = Wake()
        self._block_bytes = memory.layout.block_bytes
        self._per_frame = codec.blocks_per_frame(self._block_bytes)
        self._thread = threading.Thread(target=self._run, name="kv-giver", daemon=True)

    def start(self) -> None:
        """Once it has something to do: a link without grants gives up at its first failure. Raises RuntimeError."""
        try:
            self._thread.start()
        except RuntimeError:
            self._wake.close()
            raise

    @property
    def ended(self) -> bool:
        """No grant can be added any more."""
        with self._state:
            return self._ended

    def __len__(self) -> int:
        """Grants that it serves."""
        with self._state:
            return len(self._givings)

    def add(self, grant: GiverGrant, probe_bytes: int = 0) -> bool:
        """Serve this grant, or this probe; False when the link has ended."""
        with self._state:
            if self._ended:
                return False
            self._givings.add(grant, probe_bytes)
            idle, self._idle = self._idle, False
        if idle:
            self._wake.ring()
        return True

    def expect_call(self) -> bool:
        """The taker has called; False when the link has ended."""
        with self._state:
            self._called = not self._ended
            return self._called

    def push(self, grant: bytes, layer: int, first: int, block_ids: tuple[int, ...]) -> None:
        """Queue blocks; passed over when the grant has ended."""
        self._enqueue(frames_of(grant, layer, first, block_ids, self._per_frame))

    def commit(self, grant: bytes) -> None:
        """Queue COMMIT."""
        self._enqueue([Item(FrameType.COMMIT, grant)])

    def _enqueue(self, items: Iterable[Item]) -> None:
        with self._state:
            self._givings.put(items, self._clock.now())
            idle, self._idle = self._idle, False
        if idle:
            self._wake.ring()

    def abandon(self, grant: bytes) -> None:
        """Forget the grant; on return none of its blocks is read. Raises InternalError when the thread does not obey."""
        with self._state:
            self._givings.drop(grant)
            if self._state.wait_for(lambda: grant not in self._reading, ABANDON_S):
                return
            self._cut()
            if not self._state.wait_for(lambda: grant not in self._reading, CUT_S):
                raise InternalError("a KV link does not let go of its blocks")

    def _cut(self) -> None:
        """Lock held. A thread inside the kernel comes back at once."""
        if self._sock is not None:
            tcp_socket.cut(self._sock)

    def close(self) -> None:
        """Close the link; no events follow. Returns when the thread has ended or will not."""
        with self._state:
            self._closing = True
            self._cut()
            self._state.notify_all()
        self._wake.ring()
        self._thread.join(tcp_socket.HANDSHAKE_S + 1.0)
        if self._thread.is_alive():
            _log.error("a KV link's thread does not end", peer=self._peer)
            return
        self._wake.close()

    def _run(self) -> None:
        reason = "the link's thread broke"
        try:
            reason = self._serve_grants()
        finally:
            self._end(reason)

    def _serve_grants(self) -> str:
        """Over one connection after the other. Returns why there is no next one."""
        cause = ""
        while True:
            try:
                end = self._opening(self._hold, self._pause, bool(cause))
            except LinkBroken as broken:
                return cause + self._named(broken.message)
            _log.info("KV link open", peer=self._peer, way=end.way)
            self._per_frame = codec.blocks_per_frame(self._block_bytes, end.ring is not None)
            try:
                self._serve(end)
                return "closed"
            except LinkBroken as broken:
                reason = self._named(broken.message)
            except OSError as error:
                reason = self._named(error.strerror or str(error))
            finally:
                self._stop_reading()
                end.close()
            cause = f"{reason}; opened again: "
            self._counts.add("links_broken")
            self._fail(self._take_stock(), reason)

    def _named(self, text: str) -> str:
        return f"KV link to {self._peer}: {text}"

    def _take_stock(self) -> list[bytes]:
        """The connection broke: what was sent is to be sent again. Returns the grants that saw this too often."""
        with self._state:
            self._sock = None
            return self._givings.reopened()

    def _pause(self, wait_s: float) -> bool:
        """Before a try; False when nobody waits for it."""
        with self._state:
            closing = self._state.wait_for(lambda: self._closing, wait_s)
            if not len(self._givings) and not self._called:
                self._ended = True  # nobody can add a grant to a link that is not tried any more
            return not closing and not self._ended

    def _end(self, reason: str) -> None:
        with self._state:
            self._ended, self._sock = True, None
            lost = self._givings.clear()
            if self._closing:
                lost = []
        self._fail(lost, reason)

    def _fail(self, grants: list[bytes], reason: str) -> None:
        if grants:
            self._counts.add("failures")
            _log.warning("KV link failed", peer=self._peer, reason=reason)
        for grant in grants:
            self._events.put(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=reason))

    def _hold(self, sock: socket.socket) -> None:
        """From here on the engine thread can cut it."""
        with self._state:
            self._sock, self._called = sock, False
            if self._closing:
                raise LinkBroken("closed")

    def _serve(self, end: GiverEnd) -> None:
        sock, poller = end.sock, select.poll()
        poller.register(sock, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        while True:
            views, num_bytes = self._gather(end)
            ready = dict(poller.poll(0 if views else _IDLE_MS))
            if self._wake.fd in ready:
                self._wake.hush()
            if self._closing:
                return
            if sock.fileno() in ready:
                self._read_reply(end)
            if views:
                self._write(end, views, num_bytes)
            self._check_overdue(sock)

    def _gather(self, end: GiverEnd) -> tuple[list[memoryview], int]:
        """What goes over the socket of the next frames, of up to about BATCH_BYTES, and how many bytes that is; their grants are in
        _reading from here on. Payloads that go through shared memory are there when this returns.
        """
        views: list[memoryview] = []
        num_bytes = moved = 0
        self._stage.clear()
        while moved < BATCH_BYTES and len(views) < codec.MAX_FRAME_BLOCKS:
            with self._state:
                found = self._givings.next()
                if found is None:
                    self._idle = not views
                    break
                giving, item = found
                if item.kind is FrameType.DATA:
                    self._reading.add(item.grant)
            make = self._data if item.kind is FrameType.DATA else self._question
            header, payload, size = make(end, giving, item)
            views += [memoryview(header), *payload]
            moved += codec.HEADER_BYTES + size
            num_bytes += codec.HEADER_BYTES + (size if payload else 0)
        return views, num_bytes

    def _data(self, end: GiverEnd, giving: Giving, item: Item) -> _Frame:
        """Of blocks."""
        _, grant, layer, part, first, block_ids = item
        giving.started_s = giving.started_s or self._clock.now()
        if end.ring is None:
            views, checksum = self._stage.gather(layer, part, block_ids)
        else:
            with self._room(end, end.ring, len(block_ids) * self._block_bytes) as room:
                views, checksum = [], self._stage.lift(layer, part, block_ids, room)
            end.ring.send()
        header, data = end.session.data(grant, layer, part, first, len(block_ids), checksum)
        giving.frames.sent(header)
        self._counts.add("bytes_sent", header.length)
        return data, views, header.length

    def _question(self, end: GiverEnd, giving: Giving, item: Item) -> _Frame:
        """COMMIT, RESUME or PROBE, which the taker answers."""
        giving.committed_s = self._clock.now()
        giving.started_s = giving.started_s or giving.committed_s
        frame = memoryview(giving.question(end.session, item.kind))
        header, payload = bytes(frame[: codec.HEADER_BYTES]), frame[codec.HEADER_BYTES :]
        if end.ring is None or not payload:
            return header, [payload], payload.nbytes
        with self._room(end, end.ring, payload.nbytes) as room:
            room[:] = payload
        end.ring.send()
        return header, [], payload.nbytes

    def _write(self, end: GiverEnd, views: list[memoryview], num_bytes: int) -> None:
        try:
            tcp_socket.write_views(
                end.sock, views, num_bytes, self._clock, self._is_abandoned, self._stop_reading
            )
        except OSError:
            self._hear_last_words(end)
            raise
        finally:
            self._stop_reading()

    def _room(self, end: GiverEnd, ring: PayloadWriter, size: int) -> memoryview:
        """A place for the next payload, when the taker has taken enough out of the ring."""
        since = self._clock.now()
        while not ring.has_room(size):
            if select.select([end.sock], [], [], tcp_socket.STALL_S)[0]:
                self._read_reply(end)
            if self._clock.now() - since > tcp_socket.STALL_S:  # also when it only talks
                raise LinkBroken("the peer takes no bytes")
        return ring.place(size)

    def _is_abandoned(self) -> bool:
        with self._state:
            return any(grant not in self._givings for grant in self._reading)

    def _stop_reading(self) -> None:
        with self._state:
            self._reading.clear()
            self._state.notify_all()

    def _hear_last_words(self, end: GiverEnd) -> None:
        """The peer closed while we sent; what it said before tells why. Returns when it said nothing."""
        self._stop_reading()
        with contextlib.suppress(OSError):
            while True:
                self._read_reply(end)

    def _check_overdue(self, sock: socket.socket) -> None:
        """On a slow link the kernel holds bytes for long; while some are under way TCP itself sees to it that they move."""
        now = self._clock.now()
        with self._state:
            waiting = [giving for giving in self._givings if giving.committed_s]
        if waiting:
            failpoints.hit("p.kv.post_commit")
        if not any(now - giving.committed_s > ACK_S for giving in waiting):
            return
        if not tcp_socket.num_under_way(sock):
            raise LinkBroken("no answer to COMMIT")
        for giving in waiting:
            giving.committed_s = now

    def _read_reply(self, end: GiverEnd) -> None:
        data = bytearray(codec.HEADER_BYTES)
        views = [memoryview(data)]
        since = self._clock.now()
        while views:
            views = tcp_socket.advance(views, tcp_socket.read_into(end.sock, views))
            if views and self._clock.now() - since > tcp_socket.STALL_S:
                raise LinkBroken("half an answer")
        match end.session.on_header(bytes(data)):
            case kv_session.Acknowledged(grant=grant):
                self._on_acknowledged(grant)
            case kv_session.Taken(total=total) if end.ring is not None:
                end.ring.taken(total)
            case kv_session.Again(grant=grant):
                with self._state:
                    self._givings.again(grant)
            case kv_session.Fetched(read_grant=name, probe_bytes=num_bytes):
                self._on_fetched(name, num_bytes)
            case kv_session.Refused(grant=grant, reason=reason):
                self._on_refused(grant, codec.TEXTS[reason])
            case kv_session.Closed(reason=reason, by_peer=by_peer, grant=grant):
                if by_peer and reason in codec.OF_THE_GRANT:
                    self._on_refused(grant, self._named(codec.TEXTS[reason]))
                raise LinkBroken(codec.TEXTS[reason])

    def _on_fetched(self, name: bytes, probe_bytes: int) -> None:
        with self._state:
            if not probe_bytes:
                self._givings.fetch(name)
            elif not self._givings.fetch_probe(name, probe_bytes):
                raise LinkBroken("the peer fetches too many probes")

    def _on_acknowledged(self, grant: bytes) -> None:
        with self._state:
            giving = self._givings.get(grant)
            if giving is None:
                return  # abandoned while the answer was under way
            if not giving.committed_s:
                raise LinkBroken("an answer to no COMMIT")
            self._givings.drop(grant)
        now = self._clock.now()
        self._events.put(
            KvEvent(
                kind=KvEventKind.ACKNOWLEDGED,
                grant=grant,
                num_bytes=giving.probe_bytes or giving.frames.num_bytes,
                seconds=now - giving.started_s,
                exposed_s=now - giving.ready_s,
            )
        )

    def _on_refused(self, grant: bytes, text: str) -> None:
        with self._state:
            known = self._givings.drop(grant)
        if known is not None:
            self._events.put(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=text))
