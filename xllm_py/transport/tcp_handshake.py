"""The first messages on a KV link over TCP, from all its ends. Used by tcp_giver, tcp_fetching and tcp_accepted.

Either side connects: a giver to push, a taker to fetch, which begins with a CALL. Then the giver says HELLO, whoever connected. What
is said is wire/kv_session's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from xllm_py.base.clock import Clock
from xllm_py.transport import shm, tcp_socket
from xllm_py.transport.fabric import Fabric, FabricReader, FabricWriter
from xllm_py.transport.payload_ring import PayloadReader, PayloadWriter
from xllm_py.transport.shm import RingReader, RingWriter
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession

REOPEN_S = 0.6  # a connection that cannot be had within so long, and at the second try, has failed; less than tcp_listener.RETURN_S
_FIRST_WAIT_S = 0.02  # between two tries, doubling

Hold = Callable[
    [socket.socket], None
]  # gets a socket as soon as there is one, so that others can cut it; may raise LinkBroken
Pause = Callable[[float], bool]  # waits so many seconds; False when the link is not wanted any more
End = TypeVar("End")


class Refused(LinkBroken):
    """The peer is not who it should be, or its KV does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How to get to one peer."""

    endpoint: str
    tls: KvTls | None = None
    fabric: Fabric | None = None
    shared: str = ""  # the peer's incarnation, when shared memory may carry the payloads: its Unix socket is tried first


class GiverEnd(NamedTuple):
    """Of a connection whose handshake is done."""

    sock: socket.socket
    session: GiverSession
    ring: PayloadWriter | None  # where payloads go, when not over the socket

    @property
    def way(self) -> str:
        """How payloads go, in words."""
        if self.ring is None:
            return "tcp"
        return self.session.payloads.name.lower() if self.session.payloads else "shared memory"

    def close(self) -> None:
        """Socket and ring."""
        self.sock.close()
        if self.ring is not None:
            self.ring.close()


class TakerEnd(NamedTuple):
    """Likewise."""

    sock: socket.socket
    session: TakerSession
    ring: PayloadReader | None  # where payloads come from, when not over the socket

    def close(self) -> None:
        """Socket and ring."""
        self.sock.close()
        if self.ring is not None:
            self.ring.close()


def dial(
    way: Way,
    shake: Callable[[socket.socket], End],
    *,
    clock: Clock,
    hold: Hold,
    pause: Pause,
    again: bool,
) -> End:
    """Connect and shake hands, a few tries. again: after a connection that broke. Raises LinkBroken."""
    if again and not pause(_FIRST_WAIT_S):
        raise LinkBroken("closed")
    since, tries, waited_s = clock.now(), 0, 0.0
    while True:
        try:
            return _dial_once(way, shake, hold)
        except LinkBroken as broken:
            reason = broken.message
        except OSError as error:
            reason = error.strerror or str(error)
        left_s = REOPEN_S - max(waited_s, clock.now() - since)
        wait_s = min(_FIRST_WAIT_S * 2**tries, max(left_s, 0.0)) if tries else _FIRST_WAIT_S
        if not wait_s or not pause(wait_s):
            raise LinkBroken(reason)
        waited_s += wait_s
        tries += 1


def _dial_once(way: Way, shake: Callable[[socket.socket], End], hold: Hold) -> End:
    address = tcp_socket.split_endpoint(way.endpoint)
    sock = _connect_here(address[1], way.shared) if way.shared else None
    local = sock is not None
    if sock is None:
        sock = _connect_there(way.endpoint, address)
    try:
        tcp_socket.tune(sock)
        hold(sock)
        if way.tls is not None and not local:
            sock = way.tls.as_client(sock, address[0])
            hold(sock)
        return shake(sock)
    except BaseException:
        sock.close()
        raise


def _connect_there(endpoint: str, address: tuple[str, int]) -> socket.socket:
    try:
        return socket.create_connection(address, tcp_socket.HANDSHAKE_S)
    except ValueError as error:  # also of the name's encoding
        raise LinkBroken(f"{endpoint!r} is not host:port") from error


def _connect_here(port: int, incarnation: str) -> socket.socket | None:
    """To a peer of this host that offers shared memory; None when there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(tcp_socket.HANDSHAKE_S)
    try:
        sock.connect(shm.address_of(port, incarnation))
    except OSError:
        sock.close()
        return None
    return sock


def as_giver(
    sock: socket.socket, session: GiverSession, *, clock: Clock, fabric: Fabric | None
) -> GiverEnd:
    """HELLO, and what follows; over a Unix socket a ring is handed over, for a fabric the taker says where it is.

    Raises Refused, LinkBroken, OSError.
    """
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    sock.sendall(session.hello())
    welcome = tcp_socket.read_handshake(sock, kv_session.WELCOME_BYTES, deadline, clock)
    proof = session.on_welcome(welcome)
    if isinstance(proof, Reason):
        raise Refused(codec.TEXTS[proof])
    sock.sendall(proof)
    writer: PayloadWriter | None = None
    if sock.family == socket.AF_UNIX:
        writer = _hand_over(sock)
    elif session.payloads and fabric is not None:
        head = tcp_socket.read_handshake(sock, codec.LANDING_HEAD_BYTES, deadline, clock)
        size = codec.landing_size(head)
        if isinstance(size, Reason):
            raise Refused(codec.TEXTS[size])
        rest = tcp_socket.read_handshake(sock, size, deadline, clock)
        landing = session.on_landing(head + rest)
        if isinstance(landing, Reason):
            raise Refused(codec.TEXTS[landing])
        writer = FabricWriter(fabric, landing)
    tcp_socket.set_slices(sock)
    return GiverEnd(sock, session, writer)


def _hand_over(sock: socket.socket) -> RingWriter:
    ring = RingWriter()
    try:
        ring.hand_over(sock)
    except BaseException:
        ring.close()
        raise
    return ring


def as_taker(
    sock: socket.socket,
    session: TakerSession,
    *,
    hello: bytes = b"",
    clock: Clock,
    fabric: Fabric | None,
) -> TakerEnd:
    """Answer a HELLO, which has been read already or is read now; over a Unix socket a ring comes with it, for a fabric we say where it is.

    Raises Refused, LinkBroken, OSError.
    """
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    hello = hello or tcp_socket.read_handshake(sock, codec.HELLO_BYTES, deadline, clock)
    welcome = session.on_hello(hello)
    if isinstance(welcome, Reason):
        raise Refused(codec.TEXTS[welcome])
    sock.sendall(welcome)
    proof = tcp_socket.read_handshake(sock, codec.PROOF_BYTES, deadline, clock)
    refusal = session.on_proof(proof)
    if refusal is not None:
        raise Refused(codec.TEXTS[refusal])
    reader: PayloadReader | None = None
    if sock.family == socket.AF_UNIX:
        reader = RingReader(sock)
    elif session.payloads and fabric is not None:
        landing = reader = FabricReader(fabric)
        try:
            sock.sendall(session.landing(landing.description))
        except BaseException:
            landing.close()
            raise
    tcp_socket.set_slices(sock)
    return TakerEnd(sock, session, reader)
