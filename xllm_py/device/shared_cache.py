"""A rank's KV cache in memory that rank 0 of the same host maps too, and rank 0's view of them all as one cache.

Rank 0 alone speaks to other instances: for it the cache of a model that several ranks compute is a mirror (core.kv_memory.Mirror) in which the heads
of all ranks stand side by side. So what goes over a KV link is the same whatever the number of ranks on either side.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from xllm_py.core.kv_memory import PARTS, KvMemory
from xllm_py.device.base import KvShape
from xllm_py.device.mirror import kv_layout, regions_of

_PAGE = 4096


def create() -> int:
    """Memory of no size yet, as a file descriptor to hand to a child."""
    return os.memfd_create("xllm-kv")


def caches(fd: int, shape: KvShape) -> list[Tensor]:
    """Keys and values of each layer in turn, [blocks + 1, block_size, kv_heads, head_dim], zeros at first. Raises OSError."""
    size = (shape.num_blocks + 1, shape.block_size, shape.kv_heads, shape.head_dim)
    num_bytes = torch.Size(size).numel() * shape.dtype.itemsize
    step = -(-num_bytes // _PAGE) * _PAGE
    count = PARTS * shape.num_layers
    if os.fstat(fd).st_size == 0:
        os.ftruncate(fd, count * step)
    memory = memoryview(mmap.mmap(fd, count * step))
    return [
        torch.frombuffer(memory[at : at + num_bytes], dtype=shape.dtype).view(size)
        for at in range(0, count * step, step)
    ]


class RanksMirror:
    """Implements core.kv_memory.Mirror. caches: of each rank; heads: which of the model's KV heads each rank has."""

    def __init__(
        self, ranks: Sequence[Sequence[Tensor]], heads: Sequence[range], shape: KvShape
    ) -> None:
        """shape: of one rank."""
        self._ranks = [
            (caches, slice(mine.start, mine.stop))
            for caches, mine in zip(ranks, heads, strict=True)
        ]
        self._shape = dataclasses.replace(shape, kv_heads=max(mine.stop for mine in heads))
        size = (shape.num_blocks, shape.block_size, self._shape.kv_heads, shape.head_dim)
        self._host = [torch.zeros(size, dtype=shape.dtype) for _ in range(PARTS * shape.num_layers)]

    def take_out(self, layer: int, block_ids: Sequence[int]) -> None:
        """See Mirror."""
        here = torch.tensor(block_ids)
        for index in range(PARTS * layer, PARTS * (layer + 1)):
            for caches, heads in self._ranks:
                self._host[index][here, :, heads] = caches[index][here]

    def put_in(self, block_ids: Sequence[int]) -> None:
        """See Mirror."""
        here = torch.tensor(block_ids)
        for caches, heads in self._ranks:
            for cache, host in zip(caches, self._host, strict=True):
                cache[here] = host[here, :, heads]

    def memory(self) -> KvMemory:
        """All heads as bytes."""
        regions = regions_of(self._host)
        return KvMemory(kv_layout(self._shape), self._shape.num_blocks, regions, self)
