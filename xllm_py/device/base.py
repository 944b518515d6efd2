"""The Device protocol: memory, packed linears, the paged KV cache and attention over it.

Real so far: cpu, which is also the oracle for cuda and npu to come. Called by model/ and the rank side of engine/. A device knows tensors, blocks and
slots; it knows nothing of requests. Conformance: tests/conformance/test_device.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xllm_py.core.kv_memory import KvMemory

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """The cache of one model on one rank."""

    num_layers: int
    num_blocks: int
    block_size: int  # tokens
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Where the tokens of one step lie; the same for every layer.

    Tokens are flat, sequence after sequence, each sequence's tokens adjacent and in order of position; rows past the last
    sequence are padding. All lists have one entry per sequence.
    """

    block_tables: Tensor  # [sequences, blocks] int32; entries past a sequence's blocks are 0
    first_tokens: list[int]  # index of the first of its tokens in this step
    num_tokens: list[int]
    context_tokens: list[int]  # tokens in the cache after this step
    slots: Tensor  # [tokens without padding] int64: block * block_size + offset


class Device(Protocol):
    """See the module's text."""

    name: str

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes that weights and cache may use."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A callable x @ weight.T + bias; weight: [out, in], bias: [out]. x: [tokens, in], result [tokens, out], dtype of x.

        A row of the result must not depend, to the bit, on how many rows there are. The weight may be freed afterwards.
        """
        ...

    def row_padding(self) -> int:
        """A step's tokens are padded to a multiple of this, which row-wise kernels need to be invariant."""
        ...

    def alloc_kv(self, shape: KvShape) -> None:
        """Allocate the cache. Raises DeviceUnavailable when the memory is not there."""
        ...

    def kv_memory(self) -> KvMemory:
        """The cache as host bytes."""
        ...

    def write_kv(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store one step's keys and values. keys, values: [tokens, kv_heads, head_dim]; slots: [tokens] int64, unique."""
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, keys and values, in every layer. No block is both a source and a target."""
        ...

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """Causal attention of this step's tokens over the paged cache of one layer.

        sliding_window: how many tokens a token sees, itself and the ones just before it; 0: all.
        queries: [tokens, heads, head_dim], cache dtype; the result has the same shape and dtype; rows of padding are zero.
        Scale is head_dim ** -0.5; the softmax runs in float32 whatever the cache dtype. The result of a token depends, to the
        bit, only on its query and its context: not on chunking, other sequences, or block size.
        Source: Kwon et al. 2023, PagedAttention, section 4.1; online softmax: Milakov and Gimelshein 2018.
        """
        ...

    def close(self) -> None:
        """Free the cache."""
        ...
