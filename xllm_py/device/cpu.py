"""The cpu device: the reference, exact and reasonably fast, in plain torch.

Exactness (PERF section 4, repeated on AVX2): oneDNN's packed linears give each row the same bits for any number of rows; MKL's
do not. Attention goes over fixed, absolute windows of 512 keys in ascending order with an online softmax in float32, so that a
token sees the same sums whether it is prefilled whole, in chunks, or decoded. Windows a token cannot see add nothing: a
probability of exp(-inf) is exactly 0 and a rescale by exp(0) exactly 1.

A CPU without bfloat16 instructions computes bfloat16 models in float32 and rounds results to bfloat16; products with
emulated bfloat16 were 7 times slower there.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from xllm_py.base import process
from xllm_py.base.errors import DeviceUnavailable
from xllm_py.core.kv_memory import KvLayout, KvMemory
from xllm_py.device.base import AttentionBatch, KvShape, Linear

WINDOW = 512  # keys of one online-softmax step; absolute, never a function of chunk or block size
QUERY_TILE = 128  # tokens whose scores are held at once
# MKL gives the rows of a float32 product the same bits when there are 4, 8, 12, ... of them; the last one to three rows of an
# odd number, or of a thread's share of it, take another kernel (measured with 1 to 32 threads, 4 to 1,800 rows, AVX2 and AVX-512)
_ROWS = 4


class CpuDevice:
    """Implements device.base.Device."""

    def __init__(self, index: int, *, threads: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.name = f"cpu:{index}"
        self.threads = threads or cores or 1
        torch.set_num_threads(self.threads)  # process-wide; the only place that sets it
        self._native_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._memory: KvMemory | None = None
        self._block_size = 0

    def memory(self) -> tuple[int, int]:
        """See Device."""
        return process.host_memory()

    def row_padding(self) -> int:
        """See Device: a multiple of the threads, so that element-wise kernels split between rows, and at least 4."""
        return self.threads * -(-_ROWS // self.threads)

    def _math_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype is torch.bfloat16 and self._native_bf16 else torch.float32

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See Device."""
        math = self._math_dtype(weight.dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(math))
        offset = None if bias is None else bias.to(math)
        product = torch.ops.mkldnn._linear_pointwise

        def linear(x: Tensor) -> Tensor:
            y: Tensor = product(x.to(math), packed, offset, "none", [], "")
            return y.to(x.dtype)

        return linear

    def alloc_kv(self, shape: KvShape) -> None:
        """See Device."""
        size = (shape.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim)
        try:
            caches = [torch.zeros(size, dtype=shape.dtype) for _ in range(2 * shape.num_layers)]
        except RuntimeError as error:
            raise DeviceUnavailable(
                f"the KV cache of {shape.num_blocks} blocks could not be allocated; "
                "lower --max_cache_size"
            ) from error
        self._keys, self._values = caches[0::2], caches[1::2]
        self._block_size = shape.block_size
        name = str(shape.dtype).removeprefix("torch.")
        layout = KvLayout(
            num_layers=shape.num_layers,
            block_size=shape.block_size,
            block_bytes=shape.block_size * shape.kv_heads * shape.head_dim * shape.dtype.itemsize,
            shape=f"kv_heads={shape.kv_heads} head_dim={shape.head_dim} dtype={name}",
        )
        regions = [memoryview(cache.view(torch.uint8).numpy()).cast("B") for cache in caches]  # type: ignore[arg-type]  # an ndarray is a buffer; the stubs say so from Python 3.12 on
        self._memory = KvMemory(layout, shape.num_blocks, regions)

    def kv_memory(self) -> KvMemory:
        """See Device."""
        if self._memory is None:
            raise DeviceUnavailable("the KV cache is not allocated yet")
        return self._memory

    def write_kv(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """See Device."""
        self._keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self._values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def attend(self, queries: Tensor, layer: int, batch: AttentionBatch) -> Tensor:
        """See Device. Decoding sequences are computed together, prompts one after the other."""
        out = torch.zeros_like(queries)
        decoding = [i for i, count in enumerate(batch.num_tokens) if count == 1]
        if decoding:
            rows = torch.tensor([batch.first_tokens[i] for i in decoding])
            lengths = [batch.context_tokens[i] for i in decoding]
            tables = batch.block_tables[torch.tensor(decoding)]
            out[rows] = self._decode(queries[rows], layer, tables, lengths)
        for i, count in enumerate(batch.num_tokens):
            if count == 1:
                continue
            first, context = batch.first_tokens[i], batch.context_tokens[i]
            edges = [*range(0, count, QUERY_TILE), count]
            for start, end in pairwise(edges):
                tile = queries[first + start : first + end]
                position = context - count + start
                done = self._prefill(tile, layer, batch.block_tables[i], position)
                out[first + start : first + end] = done
        return out

    def _gather(
        self, layer: int, tables: Tensor, window: int, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one window, [sequences, kv_heads, WINDOW, head_dim], math dtype, zero past the end."""
        size = self._block_size
        positions = torch.arange(window * WINDOW, (window + 1) * WINDOW)
        inside = positions < lengths[:, None]
        columns = (positions // size).clamp(max=tables.shape[1] - 1)
        slots = tables[:, columns].long() * size + positions % size
        slots = slots.masked_fill(~inside, 0)
        outside = ~inside[:, :, None, None]
        math = self._math_dtype(self._keys[layer].dtype)
        keys = self._keys[layer].flatten(0, 1)[slots].masked_fill_(outside, 0)
        values = self._values[layer].flatten(0, 1)[slots].masked_fill_(outside, 0)
        return keys.to(math).transpose(1, 2), values.to(math).transpose(1, 2)

    def _decode(self, queries: Tensor, layer: int, tables: Tensor, lengths: list[int]) -> Tensor:
        """One token of each sequence; queries [sequences, heads, head_dim]."""
        count, heads, dim = queries.shape
        kv_heads = self._keys[layer].shape[2]
        group = heads // kv_heads
        rows = group + -group % _ROWS
        math = self._math_dtype(queries.dtype)
        grouped = queries.new_zeros(count, kv_heads, rows, dim, dtype=math)
        grouped[:, :, :group] = queries.view(count, kv_heads, group, dim)
        ends = torch.tensor(lengths)
        state = _Softmax(count * kv_heads, rows, dim)
        for window in range(-(-max(lengths) // WINDOW)):
            # sequences that end before this window take no part; a row's bits do not depend on the others
            active = (ends > window * WINDOW).nonzero().flatten()
            keys, values = self._gather(layer, tables[active], window, ends[active])
            hidden = torch.arange(window * WINDOW, (window + 1) * WINDOW) >= ends[active][:, None]
            mask = hidden[:, None, None, :].expand(-1, kv_heads, 1, -1).reshape(-1, 1, WINDOW)
            flat = (active[:, None] * kv_heads + torch.arange(kv_heads)).flatten()
            state.add(
                grouped[active].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask, flat
            )
        result = state.result().view(count, kv_heads, rows, dim)[:, :, :group]
        return result.reshape(count, heads, dim).to(queries.dtype)

    def _prefill(self, queries: Tensor, layer: int, table: Tensor, position: int) -> Tensor:
        """Adjacent tokens of one sequence from `position` on; queries [tokens, heads, head_dim]."""
        count, heads, dim = queries.shape
        kv_heads = self._keys[layer].shape[2]
        group = heads // kv_heads
        math = self._math_dtype(queries.dtype)
        # [kv_heads, tokens * group, dim]: the query heads of a KV head are rows of one product
        grouped = queries.view(count, kv_heads, group, dim).transpose(0, 1).to(math)
        grouped = grouped.reshape(kv_heads, count * group, dim)
        padding = -count * group % _ROWS
        if padding:
            grouped = torch.nn.functional.pad(grouped, (0, 0, 0, padding))
        rows = count * group + padding
        end = position + count
        where = torch.arange(position, end).repeat_interleave(group)
        where = torch.nn.functional.pad(where, (0, padding), value=position)
        state = _Softmax(kv_heads, rows, dim)
        every = torch.arange(kv_heads)
        for window in range(-(-end // WINDOW)):
            keys, values = self._gather(layer, table[None], window, torch.tensor([end]))
            positions = torch.arange(window * WINDOW, (window + 1) * WINDOW)
            mask = (positions[None, :] > where[:, None])[None]
            state.add(grouped, keys[0], values[0], mask, every)
        result = state.result()[:, : count * group].reshape(kv_heads, count, group, dim)
        return result.transpose(0, 1).reshape(count, heads, dim).to(queries.dtype)

    def close(self) -> None:
        """See Device."""
        self._keys, self._values, self._memory = [], [], None


class _Softmax:
    """Online softmax over windows: running maximum, sum and weighted values, float32.

    batch: sequences x KV heads · rows: query rows of each · the caller adds windows in ascending order.
    """

    def __init__(self, batch: int, rows: int, dim: int) -> None:
        self._scale = dim**-0.5
        self._highest = torch.full((batch, rows, 1), -torch.inf)
        self._sum = torch.zeros(batch, rows, 1)
        self._values = torch.zeros(batch, rows, dim)

    def add(
        self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, at: Tensor
    ) -> None:
        """queries [n, rows, dim], keys and values [n, WINDOW, dim], hidden [n or 1, rows or 1, WINDOW] bool, at [n]."""
        scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(self._scale)
        scores.masked_fill_(hidden, -torch.inf)
        before = self._highest[at]
        highest = torch.maximum(before, scores.amax(-1, keepdim=True))
        # only a first window in which a padded row sees nothing could make this -inf; position 0 is always seen
        rescale = torch.exp(before - highest)
        weights = scores.sub_(highest).exp_()
        self._sum[at] = self._sum[at] * rescale + weights.sum(-1, keepdim=True)
        added = torch.bmm(weights.to(values.dtype), values).float()
        self._values[at] = self._values[at] * rescale + added
        self._highest[at] = highest

    def result(self) -> Tensor:
        """[batch, rows, dim] float32."""
        return self._values / self._sum
