"""D's KV port: a thread that accepts, and owns the links (tcp_taker). Made by transport/tcp."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_socket
from xllm_py.transport.kv_events import Wake
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_taker import TakerLink
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire.kv_handshake import Identity
from xllm_py.wire.kv_taker import TakerSession

MAX_HANDSHAKES = 64  # strangers at a time
MAX_LINKS = 512
RETURN_S = 1.0  # a giver whose last link broke and that has not come back for so long has given up what it began
_PAUSE_MS = 100  # after accept failed for want of file descriptors
_IDLE_MS = 250

_log = log.get(__name__)


class Listener:
    """Accepts, and owns the links."""

    def __init__(
        self,
        *,
        socks: list[socket.socket],
        taking: Taking,
        make_identity: Callable[[], Identity],
        clock: Clock,
        tls: KvTls | None,
    ) -> None:
        self._tls = tls
        self._socks = socks
        self._taking = taking
        self._make_identity = make_identity
        self._clock = clock
        self._lock = threading.Lock()  # guards the three below
        self._links: set[TakerLink] = set()
        self._lost: dict[str, tuple[float, str]] = {}  # peer -> until when it may come back, why
        self._closing = False
        self._wake = Wake()
        for sock in socks:
            sock.setblocking(False)
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
        for sock in self._socks:
            sock.close()
        if not self._thread.is_alive():
            self._wake.close()

    def _run(self) -> None:
        poller = select.poll()
        for sock in self._socks:
            poller.register(sock, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        while not self._closing:
            poller.poll(_IDLE_MS)
            self._give_up()
            for sock in self._socks:
                self._accept(sock)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("KV listener cannot accept", reason=error.strerror)
            select.poll().poll(_PAUSE_MS)
            return
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
