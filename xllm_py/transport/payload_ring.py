"""Payloads beside the socket: one memory that the giver fills and the taker empties, in the order of the frames. Used by shm, fabric.

Both sides count places from lengths that the taker has judged already, so no place crosses the wire. The taker says now and then how
far it is. What lies there is no one's cache: the taker copies it into the blocks that a grant names, and what the giver changes
afterwards is found by the checksum over the blocks.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from itertools import islice
from typing import Protocol

from xllm_py.transport.tcp_socket import LinkBroken

RING_BYTES = 16 << 20  # room for four of the largest payloads
HOT_BYTES = (
    4 << 20
)  # payloads of up to a quarter of it stay within it: what is used again soon is in the processor's cache
TELL_BYTES = (
    2 << 20
)  # the taker says how far it is after so many bytes; with two of the largest payloads it must fit a ring


class PayloadWriter(Protocol):
    """The giver's end."""

    def has_room(self, length: int) -> bool:
        """Whether a payload fits without touching what the taker has not taken."""
        ...

    def place(self, length: int) -> memoryview:
        """Where the next payload is to be written; there must be room. To be released before `close`."""
        ...

    def send(self) -> None:
        """Have the payload at the last place there when this returns. Raises LinkBroken."""
        ...

    def taken(self, total: int) -> None:
        """The taker's word. Raises LinkBroken when it cannot be true."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


class PayloadReader(Protocol):
    """The taker's end."""

    def take(self, length: int) -> memoryview:
        """The next payload, of so many bytes, as the peer wrote it and may still change it. To be released before `close`."""
        ...

    def news(self) -> int | None:
        """How far we are, when that is worth a word."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


class _Places:
    """Where payloads lie: one after the other, at the beginning again when the end is too near. The same on both sides."""

    def __init__(self) -> None:
        self.total = 0  # bytes so far
        self._next = 0

    def of(self, length: int) -> int:
        """The place of the next payload."""
        end = HOT_BYTES if length <= HOT_BYTES // 4 else RING_BYTES
        return self._next if self._next + length <= end else 0

    def fill(self, length: int) -> int:
        """The place of this payload, which is the next one."""
        place = self.of(length)
        self._next = place + length
        self.total += length
        return place


class Memory:
    """RING_BYTES that stay where they are."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, RING_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Idempotent."""
        self.view.release()
        self._map.close()


class Outgoing:
    """A PayloadWriter over a memory of RING_BYTES; whoever inherits owns it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._places = _Places()
        self._held: deque[tuple[int, int, int]] = deque()  # not taken: total then, place, end

    def has_room(self, length: int) -> bool:
        """See PayloadWriter."""
        place = self._places.of(length)
        # in mid-ring only the oldest can be in the way: what came after the last return to the beginning lies before this place
        near = islice(self._held, 1) if place else self._held
        return all(end <= place or place + length <= start for _, start, end in near)

    def place(self, length: int) -> memoryview:
        """See PayloadWriter."""
        place = self._places.fill(length)
        self._held.append((self._places.total, place, place + length))
        return self._view[place : place + length]

    def send(self) -> None:
        """See PayloadWriter."""

    def taken(self, total: int) -> None:
        """See PayloadWriter."""
        if not 0 <= total <= self._places.total:
            raise LinkBroken("the peer says it has taken what was never there")
        while self._held and self._held[0][0] <= total:
            self._held.popleft()


class Incoming:
    """A PayloadReader over a memory of RING_BYTES; likewise."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._places = _Places()
        self._told = 0

    def take(self, length: int) -> memoryview:
        """See PayloadReader."""
        place = self._places.fill(length)
        return self._view[place : place + length]

    def news(self) -> int | None:
        """See PayloadReader."""
        total = self._places.total
        if total - self._told < TELL_BYTES:
            return None
        self._told = total
        return total
