"""The cpu device's arithmetic in plain torch: exact and reasonably fast; the oracle of the native kernels, and what stands in for them.

Exactness (PERF section 4, repeated on AVX2): oneDNN's packed linears give each row the same bits for any number of rows; MKL's do not.
Attention is torch_attention's.

A CPU without bfloat16 instructions computes bfloat16 models in float32 and rounds results to bfloat16; products with
emulated bfloat16 were 7 times slower there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.base import (
    AttentionBatch,
    Drawing,
    Head,
    HeadNorms,
    Linear,
    Quantized,
    RowWise,
    Turn,
)
from xllm_py.device.draws import best, draw
from xllm_py.device.paged import PagedCache
from xllm_py.device.torch_attention import ROWS, WindowedAttention
from xllm_py.device.torch_forms import linear8, rms_norm, rotate, silu

# oneDNN's AMX kernels give a row of a bfloat16 product other bits with other numbers of rows (27 of 54 shapes); those of AVX-512
# never did. Read when the first product is made; who sets it by hand knows better.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


class TorchKernels:
    """Implements Kernels of device.py."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._native_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.use(PagedCache())

    def use(self, cache: PagedCache) -> None:
        """See Kernels."""
        self._cache = cache
        self._attention = WindowedAttention(cache, self._math_dtype)

    def variant(self) -> str:
        """See Device. Products of other libraries may divide a sum between threads."""
        return f"torch {self._threads} threads"

    def row_padding(self) -> int:
        """See Device: a multiple of the threads, so that element-wise kernels split between rows, and at least 4."""
        return self._threads * -(-ROWS // self._threads)

    def _math_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype is torch.bfloat16 and self._native_bf16 else torch.float32

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        if isinstance(weight, Quantized):
            return linear8(weight, bias)
        math = self._math_dtype(weight.dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(math))
        offset = None if bias is None else bias.to(math)
        product = torch.ops.mkldnn._linear_pointwise

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y: Tensor = product(x.to(math), packed, offset, "none", [], "")
            y = y.to(x.dtype)
            return y if residual is None else residual + y

        return linear

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        both = self.pack_linear(weight, bias)

        def gated(x: Tensor) -> Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return silu(gate.contiguous()) * up

        return gated

    def pack_head(self, weight: Tensor) -> Head:
        """See Device."""
        return _TorchHead(weight, self.pack_linear(weight, None), self.row_padding())

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        return lambda x: rms_norm(x, weight, eps)

    def best(self, logits: Tensor) -> Tensor:
        """See Device."""
        return best(logits)

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        """See Device."""
        return draw(logits, wanted)

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kv_heads, real = self._cache.kv_heads, slots.shape[0]
        turning, plain = mixed[:, :-kv_heads], mixed[:real, -kv_heads:]
        if norms is not None:
            turning = rms_norm(turning, norms.weight, norms.eps)
        turned = rotate(turning, *turn.here)
        keys.flatten(0, 1).index_copy_(0, slots, turned[:real, -kv_heads:])
        values.flatten(0, 1).index_copy_(0, slots, plain)
        return turned[:, :-kv_heads].contiguous()

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device. Decoding sequences are computed together, prompts one after the other."""
        return self._attention.attend(queries, layer, batch, sliding_window)


class _TorchHead:
    """Implements Head."""

    def __init__(self, weight: Tensor, linear: Linear, padding: int) -> None:
        self._weight, self._linear, self._padding = weight, linear, padding

    def __call__(self, x: Tensor) -> Tensor:
        """See Head."""
        rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -rows % self._padding))
        return self._linear(padded)[:rows].float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """See Head."""
        return functional.embedding(token_ids, self._weight)
