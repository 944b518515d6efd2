"""The host's copy of a cache that lies on a device: what a KV link reads and writes, and the copies between the two.

Host pages are touched only where blocks are handed over, so the copy costs address space, not memory. Implements core.kv_memory.Mirror.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.device.base import KvShape


class HostMirror:
    """caches: [blocks, block_size, kv_heads, head_dim] on the device, keys and values of each layer in turn."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self._caches = caches
        self._host = [untouched(cache.shape, cache.dtype) for cache in caches]

    def take_out(self, layer: int, block_ids: Sequence[int]) -> None:
        """See Mirror."""
        here = torch.tensor(block_ids)
        for index in range(PARTS * layer, PARTS * (layer + 1)):
            cache = self._caches[index]
            self._host[index][here] = cache.index_select(0, here.to(cache.device)).cpu()

    def put_in(self, block_ids: Sequence[int]) -> None:
        """See Mirror."""
        here = torch.tensor(block_ids)
        for cache, host in zip(self._caches, self._host, strict=True):
            cache.index_copy_(0, here.to(cache.device), host[here].to(cache.device))

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
        shape=f"kv_heads={shape.kv_heads} head_dim={shape.head_dim} dtype={name}",
    )
