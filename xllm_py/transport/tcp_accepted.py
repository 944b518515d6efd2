"""One accepted connection and its thread. A giver that connected is served here, as tcp_taker does; a taker that called (PULL) is
handed to the link that gives to it. Made by tcp_listener.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_handshake, tcp_socket
from xllm_py.transport.fabric import Fabric
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.tcp_callers import Callers
from xllm_py.transport.tcp_handshake import Refused, TakerEnd
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_taker import TakerLink
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_handshake import Identity, answering
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What all connections that one KV port accepts have in common."""

    make_identity: Callable[[], Identity]  # with a fresh nonce
    taking: Taking
    callers: Callers
    on_call: Callable[[GiverSession], None]  # a taker's connection waits among the callers
    clock: Clock
    tls: KvTls | None
    fabric: Fabric | None


class Accepted:
    """See the module's text."""

    def __init__(
        self,
        *,
        host: Host,
        sock: socket.socket,
        on_known: Callable[[Accepted], None],
        on_end: Callable[[Accepted, str], None],
    ) -> None:
        """on_known is called when the peer has proven that it is a giver; on_end when the thread ends."""
        self._host, self._clock = host, host.clock
        self._sock = sock
        self._on_known = on_known
        self._on_end = on_end
        self.known = False
        self.place = ("", 0)  # incarnation of the giver and number of its link, when it is known
        self._thread = threading.Thread(target=self._run, name="kv-taker", daemon=True)

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
        reason, end = "the link's thread broke", None
        try:
            end = self._shake_hands()
            reason = "called"
            if end is not None:
                reason = TakerLink(end, self._host.taking, clock=self._clock).serve()
        except LinkBroken as broken:
            reason = broken.message
        except OSError as error:
            reason = f"KV link: {error.strerror or error}"
        finally:
            self._on_end(self, reason)
            if end is not None:
                end.close()
            _log.debug("KV link ended", peer=self.place[0], reason=reason)

    def _shake_hands(self) -> TakerEnd | None:
        """None: a taker called, and its connection is not ours any more."""
        try:
            return self._answer()
        except BaseException as error:
            self._sock.close()
            if isinstance(error, Refused):
                self._host.taking.counts.add("frames_rejected")
                _log.warning("KV link refused", reason=error.message)
            raise

    def _answer(self) -> TakerEnd | None:
        tcp_socket.tune(self._sock)
        if self._host.tls is not None and self._sock.family != socket.AF_UNIX:
            self._sock.settimeout(tcp_socket.HANDSHAKE_S)
            self._sock = self._host.tls.as_server(self._sock)
        deadline = self._clock.now() + tcp_socket.HANDSHAKE_S
        first = tcp_socket.read_handshake(self._sock, codec.HELLO_BYTES, deadline, self._clock)
        if codec.is_call(first):
            self._answer_call(first)
            return None
        session = TakerSession(self._host.make_identity(), self._host.taking.grants)
        end = tcp_handshake.as_taker(
            self._sock, session, hello=first, clock=self._clock, fabric=self._host.fabric
        )
        self.known, self.place = True, (session.peer, session.stream)
        try:
            self._on_known(self)
        except BaseException:
            end.close()
            raise
        return end

    def _answer_call(self, call: bytes) -> None:
        found = answering(call, self._host.make_identity())
        if isinstance(found, Reason):
            raise Refused(codec.TEXTS[found])
        peer, identity = found
        session = GiverSession(identity, peer, call)
        end = tcp_handshake.as_giver(
            self._sock, session, clock=self._clock, fabric=self._host.fabric
        )
        self._host.callers.put(end)
        self._host.on_call(session)
