"""The host's copy of a cache that lies on a device: what a KV link reads and writes, and the copies between the two.

Host pages are touched only where blocks are handed over, so the copy costs address space, not memory. Between the two lies a little pinned
memory where the device has such: pages of the whole copy are too many to pin. Implements core.kv_memory.Mirror.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.device.base import KvShape

_AT_ONCE = 16  # blocks of one layer that are copied in through pinned memory in one go


@dataclass(frozen=True, slots=True)
class Pinned:
    """Host memory that the device copies to and from by itself."""

    alloc: Callable[[Sequence[int], torch.dtype], Tensor]
    wait: Callable[[], None]  # until every copy that was asked for is done
    mark: Callable[[], Callable[[], None]]  # what it returns waits for all asked for by now
    aside: Callable[[], AbstractContextManager[Any]]  # inside, copies keep no computation waiting


def pinned_memory(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Pages that stay where they are, for the accelerator that torch knows."""
    return torch.empty(*size, dtype=dtype, pin_memory=True)


def in_place(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory like any other, for devices without a better one; copies wait by themselves."""
    return torch.empty(*size, dtype=dtype)


def _nothing() -> None:
    """What copies that wait by themselves need."""


PAGEABLE = Pinned(in_place, _nothing, lambda: _nothing, nullcontext)


class HostMirror:
    """caches: [blocks, block_size, kv_heads, head_dim] on the device, keys and values of each layer in turn."""

    def __init__(self, caches: Sequence[Tensor], pinned: Pinned = PAGEABLE) -> None:
        self._caches = caches
        self._host = [untouched(cache.shape, cache.dtype) for cache in caches]
        self._pinned = pinned
        self._room = pinned.alloc((PARTS, _AT_ONCE, *caches[0].shape[1:]), caches[0].dtype)

    def take_out(self, layer: int, block_ids: Sequence[int]) -> Callable[[], None]:
        """See Mirror. The blocks are gathered behind the layer that wrote them, and copied while the next one is computed."""
        here = torch.tensor(block_ids, dtype=torch.int64)
        there = here.to(self._caches[0].device, non_blocking=True)
        places = range(PARTS * layer, PARTS * (layer + 1))
        gathered = [self._caches[place].index_select(0, there) for place in places]
        rooms = [self._pinned.alloc(each.shape, each.dtype) for each in gathered]
        with self._pinned.aside():
            for room, each in zip(rooms, gathered, strict=True):
                room.copy_(each, non_blocking=True)
            wait = self._pinned.mark()

        def finish() -> None:
            wait()
            gathered.clear()  # not before: its memory would be somebody else's while it is read
            for place, room in zip(places, rooms, strict=True):
                self._host[place][here] = room

        return finish

    def put_in(self, block_ids: Sequence[int]) -> None:
        """See Mirror."""
        for here, there in self._pieces(block_ids):
            for layer in range(len(self._caches) // PARTS):
                for cache, host, room in self._ways(layer, len(here)):
                    torch.index_select(host, 0, here, out=room)
                    cache.index_copy_(0, there, room.to(cache.device, non_blocking=True))
                self._pinned.wait()  # the room is used again

    def _pieces(self, block_ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Some numbers of blocks, on the host and on the device."""
        for start in range(0, len(block_ids), _AT_ONCE):
            each = torch.tensor(block_ids[start : start + _AT_ONCE])
            yield each, each.to(self._caches[0].device)

    def _ways(self, layer: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(cache, its mirror, room for so many blocks) of keys and of values."""
        places = range(PARTS * layer, PARTS * (layer + 1))
        return [
            (self._caches[place], self._host[place], room[:count])
            for place, room in zip(places, self._room, strict=True)
        ]

    def memory(self, shape: KvShape) -> KvMemory:
        """The host's bytes, with this object to bring them up to date."""
        return KvMemory(kv_layout(shape), shape.num_blocks, regions_of(self._host), self)


def untouched(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages cost nothing until they are written; torch.zeros writes them all."""
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(*size)


def regions_of(tensors: Sequence[Tensor]) -> list[memoryview]:
    """Their bytes."""
    lent = [each.view(torch.uint8).numpy() for each in tensors]
    return [memoryview(region).cast("B") for region in lent]  # type: ignore[arg-type]  # an ndarray is a buffer; the stubs say so from Python 3.12 on


def kv_layout(shape: KvShape) -> KvLayout:
    """What a token's keys and values look like as bytes; the same on every device, so that unlike ones can hand over to each other."""
    name = str(shape.dtype).removeprefix("torch.")
    return KvLayout(
        num_layers=shape.num_layers,
        block_size=shape.block_size,
        block_bytes=shape.block_size * shape.kv_heads * shape.head_dim * shape.dtype.itemsize,
        shape=f"head_dim={shape.head_dim} dtype={name}",
        num_heads=shape.kv_heads,
    )
