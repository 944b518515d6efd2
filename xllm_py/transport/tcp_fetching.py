"""D's side of PULL: threads that connect to givers and ask for what was promised to us. Made by transport/tcp.

One thread a giver and stream. What comes over its connection is written by tcp_taker, as on a connection that the giver made. After a
connection that broke comes another one, and what has not landed is asked for again.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_handshake, tcp_socket
from xllm_py.transport.kv_events import Wake
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_handshake import TakerEnd, Way
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_taker import TakerLink
from xllm_py.wire import codec
from xllm_py.wire.kv_taker import TakerSession

MAX_TRIES = 4  # connections that may break, one after the other, without a new wish
MAX_KNOWN = 256  # grants, before those that landed are forgotten
_IDLE_MS = 250
_LIFE = codec.NO_GRANT  # name of the probe of one byte that only shows that the giver is there

_log = log.get(__name__)


class _Silence:
    """Tells a giver that computes from one that is gone, while we wait for it: it is asked for a sign of life."""

    def __init__(self, now: float) -> None:
        self._since_s = now
        self._asked = False

    def heard(self, now: float) -> None:
        """Anything."""
        self._since_s, self._asked = now, False

    def asks(self, now: float, *, waiting: bool) -> bool:
        """Whether to ask now. Raises LinkBroken when the last question was not answered."""
        if now - self._since_s < tcp_socket.STALL_S or not (waiting or self._asked):
            return False
        if self._asked:
            raise LinkBroken("the giver is silent")
        self._since_s, self._asked = now, True
        return True


class FetchLink:
    """See the module's text. Public methods are the engine thread's; all else is the link's thread."""

    def __init__(
        self,
        *,
        way: Way,
        peer: str,
        make_session: Callable[[], TakerSession],
        taking: Taking,
        clock: Clock,
        wanted: dict[bytes, bytes],
    ) -> None:
        """wanted: what the link before this one did not get (see `left`)."""
        self._way, self._peer = way, peer
        self._make_session = make_session
        self._taking = taking
        self._clock = clock
        self._state = threading.Condition()  # guards everything down to _ended
        self._wanted = dict(wanted)  # grant -> what allows to read for it
        self._probes: dict[bytes, tuple[int, float]] = {}  # name -> bytes, when it was asked for
        self._unsaid: list[tuple[bytes, int]] = []  # to be asked for on the connection there is
        self._sock: socket.socket | None = None
        self._closing = False
        self._ended = False
        self._broken = 0  # connections, since the last wish
        self._wake = Wake()
        self._thread = threading.Thread(target=self._run, name="kv-fetcher", daemon=True)

    def start(self) -> None:
        """Once it has something to ask for. Raises RuntimeError."""
        try:
            self._thread.start()
        except RuntimeError:
            self._wake.close()
            raise

    @property
    def ended(self) -> bool:
        """Nothing can be asked for any more."""
        with self._state:
            return self._ended

    @property
    def left(self) -> dict[bytes, bytes]:
        """What it was to fetch and did not, by grant: over another link the giver hears that nobody waits for it."""
        with self._state:
            return dict(self._wanted)

    def __len__(self) -> int:
        """Grants that wait for their blocks."""
        with self._state:
            return self._taking.num_open(self._wanted)

    def fetch(self, grant: bytes, read_grant: bytes) -> bool:
        """Ask for the blocks of a grant that is open; False when the link has ended."""
        with self._state:
            if len(self._wanted) >= MAX_KNOWN:
                self._forget_landed()
            self._wanted[grant] = read_grant
            return self._ask(read_grant, 0)

    def probe(self, name: bytes, num_bytes: int) -> bool:
        """Ask for so many bytes that go nowhere; likewise."""
        with self._state:
            self._probes[name] = (num_bytes, self._clock.now())
            return self._ask(name, num_bytes)

    def _ask(self, name: bytes, num_bytes: int) -> bool:
        """Lock held."""
        if self._ended:
            return False
        self._unsaid.append((name, num_bytes))
        self._broken = 0
        self._wake.ring()
        return True

    def close(self) -> None:
        """No events follow. Returns when the thread has ended or will not."""
        with self._state:
            self._closing = True
            if self._sock is not None:
                tcp_socket.cut(self._sock)
            self._state.notify_all()
        self._wake.ring()
        self._thread.join(tcp_socket.HANDSHAKE_S + 1.0)
        if self._thread.is_alive():
            _log.error("a KV link's thread does not end", peer=self._way.endpoint)
            return
        self._wake.close()

    def _run(self) -> None:
        reason = "the link's thread broke"
        try:
            reason = self._fetch_all()
        finally:
            self._end(f"KV link to {self._way.endpoint}: {reason}")

    def _fetch_all(self) -> str:
        """Over one connection after the other. Returns why there is no next one."""
        again = False
        while True:
            try:
                end = self._dial(again)
            except LinkBroken as broken:
                return broken.message
            self._ask_again()
            try:
                reason = self._serve(end)
            finally:
                end.close()
            if self._is_hopeless(reason):
                return reason
            again = True

    def _shake(self, sock: socket.socket) -> TakerEnd:
        session = self._make_session()
        sock.sendall(session.call())
        return tcp_handshake.as_taker(sock, session, clock=self._clock, fabric=self._way.fabric)

    def _hold(self, sock: socket.socket) -> None:
        with self._state:
            self._sock = sock
            if self._closing:
                raise LinkBroken("closed")

    def _dial(self, again: bool) -> TakerEnd:
        return tcp_handshake.dial(
            self._way,
            self._shake,
            clock=self._clock,
            hold=self._hold,
            pause=self._pause,
            again=again,
        )

    def _is_hopeless(self, reason: str) -> bool:
        """After a connection. Also an idle one is made again: the giver may not have heard that something landed."""
        _log.debug("KV link broke", peer=self._way.endpoint, reason=reason)
        with self._state:
            self._sock = None
            self._broken += 1
            return self._broken >= MAX_TRIES

    def _pause(self, wait_s: float) -> bool:
        with self._state:
            return not self._state.wait_for(lambda: self._closing, wait_s)

    def _ask_again(self) -> None:
        """Over a new connection: also for what was taken back, so that the giver hears of it."""
        with self._state:
            self._forget_landed()
            self._unsaid = [(read_grant, 0) for read_grant in self._wanted.values()]
            self._unsaid += [(name, num_bytes) for name, (num_bytes, _) in self._probes.items()]

    def _forget_landed(self) -> None:
        """Lock held."""
        names = self._taking.not_landed(self._wanted, self._peer)
        self._wanted = {grant: self._wanted[grant] for grant in names}

    def _serve(self, end: TakerEnd) -> str:
        poller = select.poll()
        poller.register(end.sock, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        silence = _Silence(self._clock.now())

        def await_frame() -> None:
            while True:
                self._say(end)
                if isinstance(end.sock, ssl.SSLSocket) and end.sock.pending():
                    return
                ready = dict(poller.poll(_IDLE_MS))
                if self._wake.fd in ready:
                    self._wake.hush()
                if self._closing:
                    raise LinkBroken("closed")
                if end.sock.fileno() in ready:
                    silence.heard(self._clock.now())
                    return
                if silence.asks(self._clock.now(), waiting=len(self) > 0):
                    tcp_socket.write_all(end.sock, end.session.fetch(_LIFE, 1), self._clock)

        link = TakerLink(
            end,
            self._taking,
            clock=self._clock,
            await_frame=await_frame,
            on_probed=self._on_probed,
        )
        return link.serve()

    def _say(self, end: TakerEnd) -> None:
        with self._state:
            unsaid, self._unsaid = self._unsaid, []
        for name, num_bytes in unsaid:
            tcp_socket.write_all(end.sock, end.session.fetch(name, num_bytes), self._clock)

    def _on_probed(self, name: bytes) -> None:
        with self._state:
            num_bytes, asked_s = self._probes.pop(name, (0, 0.0))
        if num_bytes:
            self._taking.probed(name, num_bytes, self._clock.now() - asked_s)

    def _end(self, reason: str) -> None:
        with self._state:
            self._ended, self._sock = True, None
            grants, probes = list(self._wanted), list(self._probes)
            if self._closing:
                return
        self._taking.fetching_failed(grants, probes, reason)
