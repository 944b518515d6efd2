"""The KV port: a thread that accepts, and owns what it accepted (tcp_accepted). Made by transport/tcp."""

from __future__ import annotations

import errno
import select
import socket
import threading

from xllm_py.base import log
from xllm_py.base.errors import PortInUse
from xllm_py.base.ports import port_taken
from xllm_py.transport import shm, tcp_socket
from xllm_py.transport.kv_events import Wake
from xllm_py.transport.tcp_accepted import Accepted, Host
from xllm_py.transport.tcp_socket import LinkBroken

MAX_HANDSHAKES = 64  # strangers at a time
MAX_LINKS = 512
RETURN_S = 1.0  # a giver whose last link broke and that has not come back for so long has given up what it began
_BACKLOG = 128
_PORTS_TO_TRY = 1000
_PAUSE_MS = 100  # after accept failed for want of file descriptors
_IDLE_MS = 250

_log = log.get(__name__)


class Listener:
    """Accepts, and owns the links."""

    def __init__(self, socks: list[socket.socket], host: Host) -> None:
        self._socks = socks
        self._host, self._clock = host, host.clock
        self._lock = threading.Lock()  # guards the three below
        self._links: set[Accepted] = set()
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
            link = Accepted(
                host=self._host,
                sock=sock,
                on_known=self._on_link_known,
                on_end=self._on_link_end,
            )
            try:
                link.start()
            except RuntimeError as error:
                _log.warning("KV listener cannot serve a link", reason=str(error))
                sock.close()
                return
            self._links.add(link)

    def _on_link_known(self, link: Accepted) -> None:
        """Called in its thread before it takes a frame: the link that it takes the place of must have let go of its blocks."""
        with self._lock:
            self._lost.pop(link.place[0], None)
            old = [
                other
                for other in self._links
                if other is not link and other.known and other.place == link.place
            ]
        for other in old:
            other.cut()
            if not other.join():
                raise LinkBroken("an earlier link of this peer does not end")

    def _on_link_end(self, link: Accepted, reason: str) -> None:
        with self._lock:
            self._links.discard(link)
            if link.known and not self._closing and not self._has(link.place[0]):
                self._lost[link.place[0]] = (self._clock.now() + RETURN_S, reason)

    def _has(self, peer: str) -> bool:
        """Lock held."""
        return any(link.known and link.place[0] == peer for link in self._links)

    def _give_up(self) -> None:
        """Peers whose last link ended, and that did not come back."""
        with self._lock:
            now = self._clock.now()
            late = [peer for peer, (until, _) in self._lost.items() if now >= until]
            gone = [(peer, self._lost.pop(peer)[1]) for peer in late]
        for peer, reason in gone:
            self._host.taking.link_lost(peer, reason)


def bind_here(port: int, incarnation: str) -> socket.socket:
    """The Unix socket over which peers of this host hand their shared memory. Raises PortInUse."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(shm.address_of(port, incarnation))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise PortInUse(f"no Unix socket for shared memory: {error.strerror}") from error
    return sock


def bind(host: str, port: int, may_move: bool) -> socket.socket:
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
