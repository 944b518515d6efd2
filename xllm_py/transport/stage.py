"""Copies blocks between the cache and one piece of memory: a payload beside the socket, or a buffer for blocks that lie scattered in
small pieces. Used by tcp_giver and tcp_taker.

To a socket, pieces that are large go from and to the cache's own memory. A frame of 128 blocks of 4 KiB would be 128 buffers to the kernel
and to the checksum; gathered by one call it is one, and the second copy stays in the processor's cache (docs/decisions/0042). Where the
device has a Carrier, copying and checksum are one pass (docs/decisions/0045).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import KvMemory
from xllm_py.wire import codec

MIN_PIECES = 8  # of a frame; fewer are not worth the copy
MAX_PIECE_BYTES = 32 << 10  # on average; larger ones are not either
_MAX_REMEMBERED = 64  # block lists, as in KvMemory


class Stage:
    """Room for the frames of one batch, over one cache. For one thread."""

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._room = memoryview(
            bytearray(2 * codec.FRAME_BYTES)
        )  # a batch ends with the frame that fills it
        self._used = 0
        self._rows: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def clear(self) -> None:
        """What was gathered is not needed any more."""
        self._used = 0

    def wants(self, block_ids: tuple[int, ...]) -> bool:
        """Whether these blocks are better copied than passed on piece by piece; parts of tokens always are."""
        if self._memory.is_cut:
            return True
        pieces = self._memory.num_pieces(block_ids)
        num_bytes = len(block_ids) * self._memory.layout.block_bytes
        return (
            pieces >= MIN_PIECES
            and num_bytes <= pieces * MAX_PIECE_BYTES
            and num_bytes <= len(self._room) - self._used
        )

    def room(self, num_bytes: int) -> memoryview:
        """So many bytes of it, or new ones when it is full. Only after `wants`."""
        if num_bytes > len(self._room) - self._used:
            return memoryview(bytearray(num_bytes))
        start, self._used = self._used, self._used + num_bytes
        return self._room[start : self._used]

    def gather(
        self, layer: int, part: int, block_ids: tuple[int, ...]
    ) -> tuple[list[memoryview], int]:
        """The content of these blocks, a copy or their own memory, and its checksum. Raises IndexError as KvMemory.spans does."""
        if not self.wants(block_ids):
            views = self._memory.spans(layer, part, block_ids)
            return views, payload_checksum(*views)
        copy = self.room(len(block_ids) * self._memory.layout.block_bytes)
        return [copy], self.lift(layer, part, block_ids, copy)

    def lift(self, layer: int, part: int, block_ids: tuple[int, ...], room: memoryview) -> int:
        """Copy these blocks there, one after the other. Returns the checksum of what lies there. Raises IndexError as KvMemory.spans."""
        memory = self._memory
        memory.check(layer, block_ids)
        if (carrier := memory.carrier) is not None:
            return carrier.gather(memory.region(layer, part), _index(block_ids).data, room)
        rows = self._rows_of(layer, part)
        out = np.frombuffer(room, np.uint8).reshape(len(block_ids), *rows.shape[1:])
        np.take(rows, _index(block_ids), axis=0, out=out, mode="clip")
        return payload_checksum(room)

    def land(self, layer: int, part: int, block_ids: tuple[int, ...], data: memoryview) -> int:
        """Copy into these blocks what lies there one after the other. Returns the checksum of what they got, also when somebody else
        changes `data` meanwhile. Raises IndexError as KvMemory.spans.
        """
        memory = self._memory
        memory.check(layer, block_ids)
        if (carrier := memory.carrier) is not None:
            return carrier.scatter(memory.region(layer, part), _index(block_ids).data, data)
        own = bytes(data)
        rows = self._rows_of(layer, part)
        rows[_index(block_ids)] = np.frombuffer(own, np.uint8).reshape(
            len(block_ids), *rows.shape[1:]
        )
        return payload_checksum(own)

    def _rows_of(self, layer: int, part: int) -> NDArray[np.uint8]:
        """[blocks, tokens, bytes] over the cache's own memory."""
        rows = self._rows.get((layer, part))
        if rows is None:
            region = np.frombuffer(self._memory.region(layer, part), np.uint8)
            rows = region.reshape(self._memory.num_blocks, self._memory.layout.block_size, -1)
            rows = self._rows[layer, part] = rows[:, :, self._memory.token]
        return rows


@lru_cache(maxsize=_MAX_REMEMBERED)
def _index(block_ids: tuple[int, ...]) -> NDArray[np.int64]:
    return np.fromiter(block_ids, np.int64, len(block_ids))
