"""Sockets of KV links: how they are set up, read and written. Used by tcp_giver and tcp_taker only.

Sockets are blocking with short kernel time-outs, so that one call moves a whole frame without the interpreter, and a thread
that waits still comes back often enough to see that it is no longer wanted. Everything here raises LinkBroken, or OSError.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import sys
import termios
from collections.abc import Callable, Sequence

from xllm_py.base.clock import Clock
from xllm_py.base.errors import PeerUnavailable
from xllm_py.transport import tcp_tls

HANDSHAKE_S = 2.0
STALL_S = 1.0  # bytes outstanding and none taken for so long: the link has failed
KEEPALIVE_S = 10  # an idle link asks so often whether the peer's host still lives
BUFFER_BYTES = 4 << 20
_SLICE_S = 0.05  # the longest time one call blocks
_TIMEVAL = struct.Struct("@ll")
_MAX_VIEWS = 1024  # buffers in one call; the kernel's limit


class LinkBroken(PeerUnavailable):
    """This link is over; the message says why."""


def tune(sock: socket.socket) -> None:
    """Buffers and options of a link."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            stall_ms = int(STALL_S * 1000)  # also for bytes that the kernel has taken
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def set_slices(sock: socket.socket) -> None:
    """After the handshake: block, but never longer than a slice in one call."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(_SLICE_S)
        return
    sock.settimeout(None)
    value = _TIMEVAL.pack(0, int(_SLICE_S * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def cut(sock: socket.socket) -> None:
    """From any thread: whoever waits in the kernel for this socket comes back. Quiet when the peer was quicker."""
    try:
        socket.socket.shutdown(
            sock, socket.SHUT_RDWR
        )  # TLS's own would take the encryption off first
    except OSError:
        return


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """("::1", 9) of "[::1]:9". Raises LinkBroken when there is no port."""
    host, _, port = endpoint.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise LinkBroken(f"{endpoint!r} is not host:port")
    return host.strip("[]"), int(port)


def read_handshake(sock: socket.socket, size: int, deadline: float, clock: Clock) -> bytes:
    """Exactly `size` bytes before `deadline`."""
    data = b""
    while len(data) < size:
        left_s = deadline - clock.now()
        if left_s <= 0:
            raise LinkBroken("the handshake took too long")
        sock.settimeout(left_s)
        try:
            part = sock.recv(size - len(data))
        except TimeoutError as error:
            raise LinkBroken("the handshake took too long") from error
        if not part:
            raise LinkBroken("the peer closed the link in the handshake")
        data += part
    return data


def read_into(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """What comes within a slice, at most all of `views`; 0 when nothing came. LinkBroken at the end of the stream."""
    try:
        if isinstance(sock, ssl.SSLSocket):
            found = tcp_tls.read_into(sock, views)
            if found is None:
                raise LinkBroken("the peer closed the link")
            return found
        if len(views) == 1:
            count = sock.recv_into(views[0], 0, socket.MSG_WAITALL)
        else:
            count = sock.recvmsg_into(views[:_MAX_VIEWS], 0, socket.MSG_WAITALL)[0]
    except BlockingIOError:
        return 0
    if count == 0:
        raise LinkBroken("the peer closed the link")
    return count


def write_from(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """What the kernel takes within a slice; 0 when it takes nothing."""
    if isinstance(sock, ssl.SSLSocket):
        return tcp_tls.write_from(sock, views)
    try:
        return sock.sendmsg(views[:_MAX_VIEWS])
    except BlockingIOError:
        return 0


def num_under_way(sock: socket.socket) -> int:
    """Bytes that our kernel has taken and the peer's has not."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def advance(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []


def write_views(
    sock: socket.socket,
    views: list[memoryview],
    num_bytes: int,
    clock: Clock,
    is_void: Callable[[], bool],
    let_go: Callable[[], None],
) -> None:
    """All of them, frame by frame. Once `is_void`, the peer still counts on the rest: it goes out from a copy, after `let_go`."""
    left, progress_s = num_bytes, clock.now()
    while True:
        count = write_from(sock, views)
        left -= count
        if not left:
            return
        views = advance(views, count)
        if is_void():
            views = [memoryview(b"".join(views))]
            let_go()
        now = clock.now()
        if count:
            progress_s = now
        elif now - progress_s > STALL_S:
            raise LinkBroken("the peer takes no bytes")


def write_all(sock: socket.socket, data: bytes, clock: Clock) -> None:
    """A few bytes of our own, whole."""
    views = [memoryview(data)]
    since = clock.now()
    while views:
        count = write_from(sock, views)
        views = advance(views, count)
        if count == 0 and clock.now() - since > STALL_S:
            raise LinkBroken("the peer takes no bytes")
