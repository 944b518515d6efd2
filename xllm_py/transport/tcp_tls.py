"""TLS 1.3 on KV links, both ends with a certificate of the cluster's authority. Used by tcp_handshake and tcp_socket.

A link's thread reads and writes its socket alone. Encryption copies anyway, so small blocks are put together before they go out.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence

from xllm_py.core.service_config import TlsSlice

_JOIN_BYTES = 256 << 10  # views smaller than this go out together, up to about so many bytes


class KvTls:
    """The contexts of one engine."""

    def __init__(self, files: TlsSlice) -> None:
        """Raises OSError or ssl.SSLError when a file cannot be used."""
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self._server.num_tickets = 0  # a giver's socket is readable only when the taker has spoken
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, files)

    def as_server(self, sock: socket.socket) -> ssl.SSLSocket:
        """Within the socket's time-out. Raises OSError, ssl.SSLError."""
        return self._server.wrap_socket(sock, server_side=True)

    def as_client(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        """The certificate has to name the host. Raises as `as_server`."""
        return self._client.wrap_socket(sock, server_hostname=host)


def _context(protocol: int, files: TlsSlice) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.cert_file, files.key_file)
    context.load_verify_locations(files.ca_file)
    return context


def read_into(sock: ssl.SSLSocket, views: Sequence[memoryview]) -> int | None:
    """What comes before the socket's time-out, at most all of `views`; None at the end of the stream before a byte."""
    total = 0
    try:
        for view in views:
            rest = view
            while rest:
                count = sock.recv_into(rest)
                if not count:
                    return total or None
                total += count
                rest = rest[count:]
    except TimeoutError:
        return total
    return total


def write_from(sock: ssl.SSLSocket, views: Sequence[memoryview]) -> int:
    """What goes out in one call; 0 when nothing does. After it the same bytes must come again, from wherever they lie then."""
    try:
        return sock.send(_joined(views))
    except TimeoutError:
        return 0


def _joined(views: Sequence[memoryview]) -> memoryview | bytes:
    if len(views) == 1 or views[0].nbytes >= _JOIN_BYTES:
        return views[0]
    parts, size = [], 0
    for view in views:
        parts.append(view)
        size += view.nbytes
        if size >= _JOIN_BYTES:
            break
    return b"".join(parts)
