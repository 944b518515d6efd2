"""Payloads between two processes of one host: a ring of shared memory beside the link's socket. Used by tcp_giver and tcp_taker.

The giver makes the ring (memfd), hands it over the Unix socket after the handshake, and copies each payload in before it sends the
header; the taker copies it out into the blocks that the grant names, and says now and then how far it is. Both count places from
lengths that the taker has judged already, so no place crosses the wire. The taker maps the ring for reading only, and sealed:
nobody can shrink it under its hands. What the giver changes afterwards is found by the checksum over the blocks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Sequence

from xllm_py.transport.tcp_socket import LinkBroken

RING_BYTES = (
    16 << 20
)  # four times the largest payload: two of them, a skip at the end, and what was not told of yet
TELL_BYTES = 1 << 20  # the taker says how far it is after so many bytes
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def supported() -> bool:
    """Whether this system has what it takes."""
    return hasattr(os, "memfd_create")


def address_of(port: int, incarnation: str) -> str:
    """Where the taker with this KV port listens on this host: an abstract Unix socket, which vanishes with it."""
    return f"\0xllm-kv-{port}-{incarnation}"


class _Places:
    """Where payloads lie: one after the other, at the beginning again when the end is too near. The same on both sides."""

    def __init__(self) -> None:
        self.total = 0  # bytes so far, skipped ones included

    def after(self, length: int) -> tuple[int, int]:
        """(place of the next payload, total then)."""
        place = self.total % RING_BYTES
        skip = RING_BYTES - place if place + length > RING_BYTES else 0
        return (self.total + skip) % RING_BYTES, self.total + skip + length


class RingWriter:
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
        self._view = memoryview(self._map)
        self._places = _Places()
        self._taken = 0

    def hand_over(self, sock: socket.socket) -> None:
        """Over a Unix socket, once; from then on only the two maps hold the memory."""
        socket.send_fds(sock, [b"R"], [self._fd])
        os.close(self._fd)
        self._fd = -1

    def has_room(self, length: int) -> bool:
        """Whether a payload fits without touching what the taker has not taken."""
        return self._places.after(length)[1] - self._taken <= RING_BYTES

    def put(self, views: Sequence[memoryview], length: int) -> None:
        """Copy a payload in; there must be room."""
        place, self._places.total = self._places.after(length)
        for view in views:
            end = place + view.nbytes
            self._view[place:end] = view
            place = end

    def taken(self, total: int) -> None:
        """The taker's word. Raises LinkBroken when it cannot be true."""
        if not self._taken <= total <= self._places.total:
            raise LinkBroken("the peer says it has taken what was never there")
        self._taken = total

    def close(self) -> None:
        """Give the memory back; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._view.release()
        self._map.close()


class RingReader:
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
        self._view = memoryview(self._map)
        self._places = _Places()
        self._place = 0
        self._told = 0

    def begin(self, length: int) -> None:
        """The next payload has so many bytes; `read_into` reads it."""
        self._place, self._places.total = self._places.after(length)

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views with what comes next of the payload."""
        place = self._place
        for view in views:
            end = place + view.nbytes
            view[:] = self._view[place:end]
            place = end
        count, self._place = place - self._place, place
        return count

    def news(self) -> int | None:
        """How far we are, when that is worth a word."""
        total = self._places.total
        if total - self._told < TELL_BYTES:
            return None
        self._told = total
        return total

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._view.release()
        self._map.close()
