"""The first messages on a KV link over TCP, from both ends. Used by tcp_giver and tcp_taker; what is said is wire/kv_session's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base.clock import Clock
from xllm_py.transport import shm, tcp_socket
from xllm_py.transport.shm import RingReader, RingWriter
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a giver gets to one peer."""

    endpoint: str
    tls: KvTls | None = None
    shared: str = ""  # the peer's incarnation, when shared memory may carry the payloads: its Unix socket is tried first


def call(
    way: Way,
    session: GiverSession,
    *,
    clock: Clock,
    on_socket: Callable[[socket.socket], None],
) -> tuple[socket.socket, RingWriter | None]:
    """Giver: connect and shake hands. `on_socket` gets the socket, and the one over TLS, as soon as there is one, and may raise.

    Raises LinkBroken, OSError.
    """
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    address = tcp_socket.split_endpoint(way.endpoint)
    ring: RingWriter | None = None
    sock = _connect_here(address[1], way.shared) if way.shared else None
    local = sock is not None
    if sock is None:
        sock = _connect_there(way.endpoint, address)
    try:
        tcp_socket.tune(sock)
        on_socket(sock)
        if way.tls is not None and not local:
            sock = way.tls.as_giver(sock, address[0])
            on_socket(sock)
        sock.sendall(session.hello())
        welcome = tcp_socket.read_handshake(sock, kv_session.WELCOME_BYTES, deadline, clock)
        proof = session.on_welcome(welcome)
        if isinstance(proof, Reason):
            raise LinkBroken(f"KV link to {way.endpoint}: {codec.TEXTS[proof]}")
        sock.sendall(proof)
        if local:
            ring = RingWriter()
            ring.hand_over(sock)
        tcp_socket.set_slices(sock)
    except BaseException:
        sock.close()
        if ring is not None:
            ring.close()
        raise
    return sock, ring


def _connect_there(endpoint: str, address: tuple[str, int]) -> socket.socket:
    try:
        return socket.create_connection(address, tcp_socket.HANDSHAKE_S)
    except ValueError as error:  # also of the name's encoding
        raise LinkBroken(f"{endpoint!r} is not host:port") from error


def _connect_here(port: int, incarnation: str) -> socket.socket | None:
    """To a taker of this host that offers shared memory; None when there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(tcp_socket.HANDSHAKE_S)
    try:
        sock.connect(shm.address_of(port, incarnation))
    except OSError:
        sock.close()
        return None
    return sock


def answer(
    sock: socket.socket, session: TakerSession, *, clock: Clock
) -> Reason | RingReader | None:
    """Taker: shake hands. Returns why the peer is refused; else it is known now, over a Unix socket with its ring.

    Raises LinkBroken, OSError.
    """
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    hello = tcp_socket.read_handshake(sock, codec.HELLO_BYTES, deadline, clock)
    welcome = session.on_hello(hello)
    if isinstance(welcome, Reason):
        return welcome
    sock.sendall(welcome)
    proof = tcp_socket.read_handshake(sock, codec.PROOF_BYTES, deadline, clock)
    refusal = session.on_proof(proof)
    if refusal is not None:
        return refusal
    ring = RingReader(sock) if sock.family == socket.AF_UNIX else None
    tcp_socket.set_slices(sock)
    return ring
