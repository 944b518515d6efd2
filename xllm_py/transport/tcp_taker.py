"""D's end of KV links over TCP: a listener thread, and for each link a thread that writes granted blocks and nothing else.

Made by transport/tcp. All links share one GrantTable under one lock (`Taking`); a payload is read without the lock, straight
into the blocks that the header's grant names. A grant that is revoked in mid-frame gets no byte more: the rest of the frame
goes into the sink. A link that does wrong is told why and closed; no exception leaves its thread.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_handshake, tcp_socket
from xllm_py.transport.kv_events import Wake
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_grants import MAX_REMEMBERED, GrantState
from xllm_py.wire.kv_handshake import Identity
from xllm_py.wire.kv_session import Take
from xllm_py.wire.kv_taker import TakerSession

MAX_HANDSHAKES = 64  # strangers at a time
MAX_LINKS = 512
RETURN_S = 1.0  # a giver whose last link broke and that has not come back for so long has given up what it began
LINGER_S = 0.25  # how long a rejected peer gets to read why
_SINK_BYTES = 1 << 18
_PAUSE_MS = 100  # after accept failed for want of file descriptors
_IDLE_MS = 250

_log = log.get(__name__)


class Listener:
    """Accepts, and owns the links."""

    def __init__(
        self,
        *,
        sock: socket.socket,
        taking: Taking,
        make_identity: Callable[[], Identity],
        clock: Clock,
        tls: KvTls | None,
    ) -> None:
        self._tls = tls
        self._sock = sock
        self._taking = taking
        self._make_identity = make_identity
        self._clock = clock
        self._lock = threading.Lock()  # guards the three below
        self._links: set[TakerLink] = set()
        self._lost: dict[str, tuple[float, str]] = {}  # peer -> until when it may come back, why
        self._closing = False
        self._wake = Wake()
        self._sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kv-listener", daemon=True)
        self._thread.start()

    @property
    def num_links(self) -> int:
        """Open links, strangers included."""
        with self._lock:
            return len(self._links)

    def close(self) -> None:
        """End listener and links and wait for their threads."""
        with self._lock:
            self._closing = True
            links = list(self._links)
        self._wake.ring()
        self._thread.join(tcp_socket.STALL_S)
        for link in links:
            link.cut()
        for link in links:
            link.join()
        self._sock.close()
        if not self._thread.is_alive():
            self._wake.close()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        while not self._closing:
            poller.poll(_IDLE_MS)
            self._give_up()
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                _log.warning("KV listener cannot accept", reason=error.strerror)
                select.poll().poll(_PAUSE_MS)
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        with self._lock:
            strangers = sum(1 for link in self._links if not link.known)
            full = strangers >= MAX_HANDSHAKES or len(self._links) >= MAX_LINKS
            if full or self._closing:
                sock.close()
                return
            session = TakerSession(self._make_identity(), self._taking.grants)
            link = TakerLink(
                sock=sock,
                session=session,
                taking=self._taking,
                on_known=self._on_link_known,
                on_end=self._on_link_end,
                clock=self._clock,
                tls=self._tls,
            )
            try:
                link.start()
            except RuntimeError as error:
                _log.warning("KV listener cannot serve a link", reason=str(error))
                sock.close()
                return
            self._links.add(link)

    def _on_link_known(self, link: TakerLink) -> None:
        """Called in its thread before it takes a frame: the link that it takes the place of must have let go of its blocks."""
        with self._lock:
            self._lost.pop(link.peer, None)
            old = [
                other
                for other in self._links
                if other is not link and other.known and _place(other) == _place(link)
            ]
        for other in old:
            other.cut()
            if not other.join():
                raise LinkBroken("an earlier link of this peer does not end")

    def _on_link_end(self, link: TakerLink, reason: str) -> None:
        with self._lock:
            self._links.discard(link)
            if link.known and not self._closing and not self._has(link.peer):
                self._lost[link.peer] = (self._clock.now() + RETURN_S, reason)

    def _has(self, peer: str) -> bool:
        """Lock held."""
        return any(link.known and link.peer == peer for link in self._links)

    def _give_up(self) -> None:
        """Peers whose last link ended, and that did not come back."""
        with self._lock:
            now = self._clock.now()
            late = [peer for peer, (until, _) in self._lost.items() if now >= until]
            gone = [(peer, self._lost.pop(peer)[1]) for peer in late]
        for peer, reason in gone:
            self._taking.link_lost(peer, reason)


def _place(link: TakerLink) -> tuple[str, int]:
    return link.peer, link.stream


class TakerLink:
    """One accepted connection and its thread."""

    def __init__(
        self,
        *,
        sock: socket.socket,
        session: TakerSession,
        taking: Taking,
        on_known: Callable[[TakerLink], None],
        on_end: Callable[[TakerLink, str], None],
        clock: Clock,
        tls: KvTls | None,
    ) -> None:
        self._tls = tls
        self._sock = sock
        self._session = session
        self._taking = taking
        self._on_known = on_known
        self._on_end = on_end
        self._clock = clock
        self.known = False  # the handshake is done
        self._rejected = ""  # why we closed it
        self._told: set[bytes] = set()  # revoked grants of which the peer knows
        self._sink = memoryview(bytearray(_SINK_BYTES))
        self._thread = threading.Thread(target=self._run, name="kv-taker", daemon=True)

    @property
    def peer(self) -> str:
        """Incarnation of the giver, true once `known`."""
        return self._session.peer

    @property
    def stream(self) -> int:
        """Which of the giver's links, true once `known`."""
        return self._session.stream

    def start(self) -> None:
        """Run."""
        self._thread.start()

    def cut(self) -> None:
        """From another thread: end soon."""
        tcp_socket.cut(self._sock)

    def join(self) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(tcp_socket.HANDSHAKE_S + 1.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reason = "the link's thread broke"
        try:
            self._shake_hands()
            while self._serve_frame():
                pass
            reason = "the giver gave the link up"
        except LinkBroken as broken:
            reason = broken.message
        except OSError as error:
            reason = f"KV link: {error.strerror or error}"
        finally:
            self._on_end(self, self._rejected or reason)
            self._sock.close()
            _log.debug("KV link ended", peer=self.peer, reason=reason)

    def _shake_hands(self) -> None:
        tcp_socket.tune(self._sock)
        if self._tls is not None:
            self._sock.settimeout(tcp_socket.HANDSHAKE_S)
            self._sock = self._tls.as_taker(self._sock)
        refusal = tcp_handshake.answer(self._sock, self._session, clock=self._clock)
        if refusal is not None:
            self._taking.counts.add("frames_rejected")
            _log.warning("KV link refused", reason=codec.TEXTS[refusal])
            raise LinkBroken(codec.TEXTS[refusal])
        self.known = True
        self._on_known(self)

    def _serve_frame(self) -> bool:
        """Take one frame; False when the link is to be closed."""
        data = self._read_header()
        with self._taking.lock:
            judged = self._session.on_header(data)
        match judged:
            case Take():
                return self._take(judged)
            case kv_session.Asked(grant=grant, landed=landed):
                say = self._session.ack if landed else self._session.again
                tcp_socket.write_all(self._sock, say(grant), self._clock)
                return True
            case kv_session.Late():
                return self._answer(judged)
            case kv_session.Reject():
                self._reject(judged)
        return False

    def _read_header(self) -> bytes:
        """Idle links wait here for ever; half a header has to become a whole one soon."""
        data = bytearray(codec.HEADER_BYTES)
        views = [memoryview(data)]
        progress_s = 0.0
        while views:
            count = tcp_socket.read_into(self._sock, views)
            views = tcp_socket.advance(views, count)
            now = self._clock.now()
            if count:
                progress_s = now
            elif progress_s and now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("half a frame header")
        return bytes(data)

    def _take(self, take: Take) -> bool:
        grant = take.grant
        try:
            crc, payload = self._read_payload(take)
        except (LinkBroken, OSError):
            with self._taking.lock:
                left_early = take.grant is not grant
                self._session.on_lost(take)
                if not left_early:
                    self._taking.settle(grant)
            raise
        with self._taking.lock:
            left_early = take.grant is not grant
            result = self._session.on_payload(take, crc, payload)
            if not left_early:
                self._taking.settle(grant)
            if isinstance(result, kv_session.Landed):
                self._taking.landed(result, self._clock.now())
        if take.is_data:
            self._taking.counts.add("bytes_received", take.header.length)
        return self._answer(result)

    def _answer(self, result: kv_session.Result) -> bool:
        if isinstance(result, kv_session.Landed):
            tcp_socket.write_all(self._sock, self._session.ack(result.grant), self._clock)
        elif isinstance(result, kv_session.Probed):
            tcp_socket.write_all(self._sock, self._session.arrived(result.probe), self._clock)
        elif isinstance(result, kv_session.Late) and result.grant not in self._told:
            if len(self._told) >= MAX_REMEMBERED:
                self._told.clear()  # to be told twice does no harm
            self._told.add(result.grant)
            self._taking.counts.add("frames_late")
            error = self._session.error(Reason.REVOKED, result.grant)
            tcp_socket.write_all(self._sock, error, self._clock)
        elif isinstance(result, kv_session.Reject):
            self._reject(result)
            return False
        return True

    def _read_payload(self, take: Take) -> tuple[int, bytes]:
        """(checksum of what came, the bytes themselves when it is a COMMIT)."""
        if take.is_commit:
            payload = bytearray(take.header.length)
            self._fill(take, [memoryview(payload)], len(payload))
            return tcp_socket.checksum([memoryview(payload)]), bytes(payload)
        if take.store:
            return self._write_blocks(take), b""
        return self._drain(take.header.length), b""

    def _write_blocks(self, take: Take) -> int:
        header = take.header
        memory = self._taking.memory.at(self._session.block_size)
        views = memory.spans(header.layer, header.part, take.block_ids)
        with self._taking.lock:
            if take.grant is not None:
                self._taking.arriving(take.grant, self._clock.now())
        left = self._fill(take, views, header.length)
        if left:
            self._drain(left)
            return header.crc  # nothing of it is used
        return tcp_socket.checksum(views)

    def _fill(self, take: Take, views: list[memoryview], left: int) -> int:
        """Read into the views, `left` bytes; stops when the grant is revoked meanwhile. Returns the number of bytes left."""
        progress_s = self._clock.now()
        while not (take.store and self._is_revoked(take)):
            count = tcp_socket.read_into(self._sock, views)
            left -= count
            if not left:
                return 0
            views = tcp_socket.advance(views, count)
            now = self._clock.now()
            if count:
                progress_s = now
            elif now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("the giver stopped in the middle of a frame")
        return left

    def _is_revoked(self, take: Take) -> bool:
        """When it is, the frame leaves the blocks here and now."""
        grant = take.grant
        if grant is None or grant.state is not GrantState.REVOKED:
            return False
        with self._taking.lock:
            self._session.leave(take)
            self._taking.settle(grant)
        return True

    def _drain(self, length: int) -> int:
        """Read `length` bytes into the sink; returns their checksum."""
        crc = 0
        progress_s = self._clock.now()
        while length:
            view = self._sink[: min(length, _SINK_BYTES)]
            count = tcp_socket.read_into(self._sock, [view])
            crc = tcp_socket.checksum([view[:count]], crc)
            length -= count
            now = self._clock.now()
            if count:
                progress_s = now
            elif now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("the giver stopped in the middle of a frame")
        return crc

    def _reject(self, reject: kv_session.Reject) -> None:
        """Say why, and give the peer a moment to read it: bytes of ours on the way would be lost by a reset."""
        text = self._rejected = codec.TEXTS[reject.reason]
        self._taking.counts.add("frames_rejected")
        _log.warning("KV frame rejected", peer=self.peer, reason=text)
        if reject.failed:
            with self._taking.lock:
                self._taking.failed(reject.grant, text)
        error = self._session.error(reject.reason, reject.grant)
        tcp_socket.write_all(self._sock, error, self._clock)
        socket.socket.shutdown(self._sock, socket.SHUT_WR)
        deadline = self._clock.now() + LINGER_S
        while self._clock.now() < deadline:
            tcp_socket.read_into(self._sock, [self._sink])
