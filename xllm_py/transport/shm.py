"""Payloads between two processes of one host: a ring of shared memory beside the link's socket. Used by tcp_handshake.

The giver makes the ring (memfd), hands it over the Unix socket after the handshake, and copies each payload in before it sends the
header; the taker copies it out (transport/payload_ring). The taker maps the ring for reading only, and sealed: nobody can shrink it
under its hands.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket

from xllm_py.transport.payload_ring import RING_BYTES, Incoming, Outgoing
from xllm_py.transport.tcp_socket import LinkBroken

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def supported() -> bool:
    """Whether this system has what it takes."""
    return hasattr(os, "memfd_create")


def address_of(port: int, incarnation: str) -> str:
    """Where the side with this KV port listens on this host: an abstract Unix socket, which vanishes with it."""
    return f"\0xllm-kv-{port}-{incarnation}"


class RingWriter(Outgoing):
    """The giver's end."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._fd = os.memfd_create("xllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, RING_BYTES)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, RING_BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        super().__init__(memoryview(self._map))

    def hand_over(self, sock: socket.socket) -> None:
        """Over a Unix socket, once; from then on only the two maps hold the memory."""
        socket.send_fds(sock, [b"R"], [self._fd])
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """See PayloadWriter."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._view.release()
        self._map.close()


class RingReader(Incoming):
    """The taker's end."""

    def __init__(self, sock: socket.socket) -> None:
        """Take it from the peer. Raises LinkBroken when it is none, OSError."""
        word, fds, _, _ = socket.recv_fds(sock, 1, 1)
        try:
            if word != b"R" or len(fds) != 1:
                raise LinkBroken("the peer handed no shared memory over")
            sealed = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not sealed or os.fstat(fds[0]).st_size != RING_BYTES:
                raise LinkBroken("the peer's shared memory can change its size")
            self._map = mmap.mmap(fds[0], RING_BYTES, prot=mmap.PROT_READ)
        finally:
            for fd in fds:
                os.close(fd)
        super().__init__(memoryview(self._map))

    def close(self) -> None:
        """See PayloadReader."""
        self._view.release()
        self._map.close()
