"""The Device protocol: memory, packed linears, the paged KV cache, and the layers' arithmetic over it.

Real: cpu, cuda, npu; cpu's torch form is the oracle of the others. Called by model/ and the rank side of engine/. A device
knows tensors, blocks and slots; it knows nothing of requests. Conformance: tests/conformance/test_device.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xllm_py.core.kv_memory import KvMemory

RowWise = Callable[[Tensor], Tensor]  # each row of the result depends on its row alone, to the bit


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of 8-bit integers: its rows times their scales."""

    values: Tensor  # [out, in] int8, from -127 to 127
    scales: Tensor  # [out] float32


class Linear(Protocol):
    """x @ weight.T + bias, and what it is added to: x [tokens, in], residual and result [tokens, out], all of one dtype."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Rows do not depend on each other, to the bit."""
        ...


class Head(Protocol):
    """The matrix from hidden states to the vocabulary."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, hidden] -> [rows, vocabulary] float32, on the device; good until the next call."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """Its rows, [tokens, hidden]: an embedding that shares the matrix."""
        ...


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

    All of it lies on the host. Tokens are flat, sequence after sequence, each sequence's tokens adjacent and in order of position; rows past the last
    sequence are padding.
    """

    block_tables: Tensor  # [sequences, blocks] int32; entries past a sequence's blocks are 0
    first_tokens: Tensor  # [sequences] int64, index of the first of its tokens in this step
    num_tokens: Tensor  # [sequences] int64
    context_tokens: Tensor  # [sequences] int64, tokens in the cache after this step
    slots: Tensor  # [tokens without padding] int64: block * block_size + offset


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How the tokens of one step are rotated; the same for every layer."""

    cos: Tensor  # [positions, head_dim], of every position, in the model's dtype
    sin: Tensor
    positions: Tensor  # [tokens] int64, of this step, with padding

    @cached_property
    def here(self) -> tuple[Tensor, Tensor]:
        """cos and sin of this step's tokens, [tokens, 1, head_dim]."""
        return self.cos[self.positions].unsqueeze(1), self.sin[self.positions].unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """RMS norms of the heads of queries and keys, before they are rotated."""

    weight: Tensor  # [heads + KV heads, head_dim]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What is drawn from one row of logits."""

    row: int
    temperature: float  # above 0
    top_k: int  # the vocabulary's size: all
    top_p: float  # 1: all
    min_p: float
    numbers: NDArray[np.float64]  # uniform in [0, 1), one for each token that is drawn
    weights: Tensor | None = (
        None  # [vocabulary] float32, takes what each token weighs after the cuts; the highest weighs 1
    )


class Device(Protocol):
    """See the module's text."""

    name: str
    collectives: (
        str  # torch.distributed's name of what sums its tensors over ranks: gloo, nccl or hccl
    )

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes that weights and cache may use."""
        ...

    def variant(self) -> str:
        """What the bits of its results depend on besides the numbers: kernels, and threads where they matter."""
        ...

    def put(self, tensor: Tensor) -> Tensor:
        """The same numbers where the device computes: itself, where that is the host."""
        ...

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Have it copied to the host, behind what was asked of the device by now; what is returned waits for it and for nothing later."""
        ...

    def row_padding(self) -> int:
        """A step's tokens are padded to a multiple of this, which row-wise kernels may need to be invariant."""
        ...

    # what a model is built of; tensors that are given may be freed afterwards

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """weight: [out, in], bias: [out].

        With 8-bit weights the rows of x become 8-bit integers too, each with a scale of its own (its largest magnitude / 127); products
        are summed exactly. Source: Yao et al. 2022, ZeroQuant, section 3.1.
        """
        ...

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """silu(gate) * up of one product; weight: [2 * inner, in], gate's rows first: [tokens, in] -> [tokens, inner].

        Source: Shazeer 2020, GLU variants.
        """
        ...

    def pack_head(self, weight: Tensor) -> Head:
        """weight: [vocabulary, hidden]."""
        ...

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """x / sqrt(mean(x^2) + eps) * weight, in float32; x: [..., size]. Source: Zhang and Sennrich 2019."""
        ...

    def best(self, logits: Tensor) -> Tensor:
        """Of each row [vocabulary] float32: its highest number's index, the lowest of equal ones, and whether all are finite: [rows, 2] int64.

        The index of a row that is not finite means nothing, but it is one.
        """
        ...

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        """For each entry the tokens that its numbers pick from the cumulative distribution of its row, in id order.

        logits: [rows, vocabulary] float32, on the host or where the device computes, none NaN or positive infinity, each row that is drawn from with a finite one; unchanged. The cuts: min_p (Nguyen et al. 2024), then
        top_k, then top_p (Holtzman et al. 2020) of what is left; of equal weights those with lower ids stay. What is drawn depends,
        to the bit, only on the row's logits and its entry.
        """
        ...

    # the cache

    def alloc_kv(self, shape: KvShape) -> None:
        """Allocate the cache. Raises DeviceUnavailable when the memory is not there."""
        ...

    def kv_memory(self) -> KvMemory:
        """The cache as host bytes; with a mirror where it is not host memory."""
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, keys and values, in every layer. No block is both a source and a target."""
        ...

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """Norm and rotate queries and keys, store keys and values in the cache, and return the queries.

        mixed: [tokens, heads + 2 * KV heads, head_dim], queries, keys, values; slots: [tokens without padding] int64, unique.
        The result: [tokens, heads, head_dim].
        Source: Su et al. 2021, RoFormer, with the halves layout of the Hugging Face checkpoints.
        """
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
