"""The paged cache of one rank as its kernels see it: a tensor of keys and one of values per layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Each tensor: [blocks + 1, block_size, kv_heads, head_dim]; the last block stays zero and belongs to nobody."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    block_size: int = 0  # tokens
    kv_heads: int = 0
