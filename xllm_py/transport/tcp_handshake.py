"""The first messages on a KV link over TCP, from both ends. Used by tcp_giver and tcp_taker; what is said is wire/kv_session's."""

from __future__ import annotations

import socket
from collections.abc import Callable

from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_socket
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession


def call(
    endpoint: str,
    session: GiverSession,
    *,
    clock: Clock,
    tls: KvTls | None,
    on_socket: Callable[[socket.socket], None],
) -> socket.socket:
    """Giver: connect and shake hands. `on_socket` gets the socket, and the one over TLS, as soon as there is one, and may raise.

    Raises LinkBroken, OSError.
    """
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    address = tcp_socket.split_endpoint(endpoint)
    try:
        sock = socket.create_connection(address, tcp_socket.HANDSHAKE_S)
    except ValueError as error:  # also of the name's encoding
        raise LinkBroken(f"{endpoint!r} is not host:port") from error
    try:
        tcp_socket.tune(sock)
        on_socket(sock)
        if tls is not None:
            sock = tls.as_giver(sock, address[0])
            on_socket(sock)
        sock.sendall(session.hello())
        welcome = tcp_socket.read_handshake(sock, kv_session.WELCOME_BYTES, deadline, clock)
        proof = session.on_welcome(welcome)
        if isinstance(proof, Reason):
            raise LinkBroken(f"KV link to {endpoint}: {codec.TEXTS[proof]}")
        sock.sendall(proof)
        tcp_socket.set_slices(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def answer(sock: socket.socket, session: TakerSession, *, clock: Clock) -> Reason | None:
    """Taker: shake hands; None: the peer is known now, else why it is refused. Raises LinkBroken, OSError."""
    deadline = clock.now() + tcp_socket.HANDSHAKE_S
    hello = tcp_socket.read_handshake(sock, codec.HELLO_BYTES, deadline, clock)
    welcome = session.on_hello(hello)
    if isinstance(welcome, Reason):
        return welcome
    sock.sendall(welcome)
    proof = tcp_socket.read_handshake(sock, codec.PROOF_BYTES, deadline, clock)
    refusal = session.on_proof(proof)
    if refusal is None:
        tcp_socket.set_slices(sock)
    return refusal
