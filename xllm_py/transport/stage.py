"""Blocks that lie scattered in small pieces go through one buffer: a call for each piece costs more than copying it. Used by tcp_giver
and tcp_taker.

A frame of 128 blocks of 4 KiB is 128 buffers to the kernel and to the checksum; gathered by one call it is one, and the second copy stays
in the processor's cache (docs/decisions/0042). Pieces that are large go from and to the cache's own memory.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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

    def gather(self, layer: int, part: int, block_ids: tuple[int, ...]) -> list[memoryview]:
        """The content of these blocks: a copy, or their own memory. Raises IndexError as KvMemory.spans does."""
        if not self.wants(block_ids):
            return self._memory.spans(layer, part, block_ids)
        self._memory.check(layer, block_ids)
        rows, wanted = self._rows_of(layer, part), _index(block_ids)
        copy = self.room(len(block_ids) * self._memory.layout.block_bytes)
        if self._memory.gather is not None and not self._memory.is_cut:
            self._memory.gather(rows.data, wanted.data, copy)
        else:
            out = np.frombuffer(copy, np.uint8).reshape(len(block_ids), *rows.shape[1:])
            np.take(rows, wanted, axis=0, out=out, mode="clip")
        return [copy]

    def scatter(self, layer: int, part: int, block_ids: tuple[int, ...], data: memoryview) -> None:
        """Into these blocks, one after the other. Only after `wants`."""
        rows = self._rows_of(layer, part)
        come = np.frombuffer(data, np.uint8).reshape(len(block_ids), *rows.shape[1:])
        rows[_index(block_ids)] = come

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
