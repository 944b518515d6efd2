"""The cpu device's arithmetic in C++: the same operations as torch_kernels, about twice as fast, over packed weights and the cache.

A call costs one or two microseconds beside its work, which is what a step of a small model is made of. Bits differ from torch's; they
depend on nothing but a row's own numbers, whatever the number of rows or threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device import base
from xllm_py.device.base import (
    AttentionBatch,
    Head,
    HeadNorms,
    Linear,
    Quantized,
    RowWise,
    Turn,
)
from xllm_py.device.cpu.native.library import (
    ADD,
    GATE,
    PLAIN,
    Attention,
    Drawing,
    Library,
    Rotation,
)
from xllm_py.device.paged import PagedCache

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # what the library calls them


class NativeKernels:
    """Implements Kernels of device.py, for float32 and bfloat16."""

    def __init__(self, library: Library, threads: int) -> None:
        self._library = library
        self._threads = threads
        self._cache, self._dtype = PagedCache(), 0
        self._pointers: list[tuple[int, int]] = []  # of keys and values, layer by layer
        self._rotation, self._attention = Rotation(), Attention()
        self._at_rotation = ctypes.addressof(self._rotation)
        self._at_attention = ctypes.addressof(self._attention)
        self._told: AttentionBatch | None = None  # the batch that stands in _attention

    def use(self, cache: PagedCache) -> None:
        """See Kernels. Raises DeviceUnavailable for heads that are larger than the kernels' buffers."""
        most = self._library.most_head_dim()
        if cache.keys and cache.keys[0].shape[-1] > most:
            raise DeviceUnavailable(
                f"heads of {cache.keys[0].shape[-1]} numbers are larger than the cpu's kernels take ({most}); "
                "use another model"
            )
        self._cache, self._told = cache, None
        self._dtype = DTYPES[cache.keys[0].dtype] if cache.keys else 0
        caches = zip(cache.keys, cache.values, strict=True)
        self._pointers = [(keys.data_ptr(), values.data_ptr()) for keys, values in caches]
        for tensor in (*cache.keys, *cache.values):
            self._library.huge_pages(tensor.data_ptr(), tensor.nbytes)

    def variant(self) -> str:
        """See Device. Threads only divide the work."""
        return f"native {self._library.instruction_set}"

    def row_padding(self) -> int:
        """See Device."""
        return 1

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        packed = self._pack(weight, bias, gated=False)
        return _Linear(self._library, packed, self._threads)

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        packed = self._pack(weight, bias, gated=True)
        return _Gated(self._library, packed, self._threads)

    def pack_head(self, weight: Tensor) -> Head:
        """See Device."""
        packed = self._pack(weight, None, gated=False)
        return _Head(self._library, packed, self._threads)

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        weight = weight.contiguous()
        size, call, threads = weight.shape[0], self._library.norm, self._threads
        at_weight, dtype = weight.data_ptr(), DTYPES[weight.dtype]

        def norm(x: Tensor, _kept: Tensor = weight) -> Tensor:
            x = x.contiguous()
            out = torch.empty_like(x)
            rows = x.numel() // size
            call(x.data_ptr(), at_weight, out.data_ptr(), rows, size, eps, dtype, threads)
            return out

        return norm

    def best(self, logits: Tensor) -> Tensor:
        """See Device."""
        rows, size = logits.shape
        found = torch.empty(rows, 2, dtype=torch.int64)
        self._library.best(logits.data_ptr(), found.data_ptr(), rows, size, self._threads)
        return found

    def draw(self, logits: Tensor, wanted: Sequence[base.Drawing]) -> list[list[int]]:
        """See Device."""
        ends = np.cumsum([len(each.numbers) for each in wanted])
        numbers = np.concatenate([each.numbers for each in wanted])
        tokens = np.empty(len(numbers), dtype=np.int64)
        told = (Drawing * len(wanted))()
        begin = 0
        for it, each, end in zip(told, wanted, ends.tolist(), strict=True):
            it.numbers, it.tokens = numbers.ctypes.data + 8 * begin, tokens.ctypes.data + 8 * begin
            it.weights = None if each.weights is None else each.weights.data_ptr()
            it.row, it.count, it.most = each.row, end - begin, each.top_k
            it.temperature, it.share, it.least = each.temperature, each.top_p, each.min_p
            begin = end
        at = ctypes.addressof(told)
        self._library.draw(logits.data_ptr(), at, len(wanted), logits.shape[1], self._threads)
        return [each.tolist() for each in np.split(tokens, ends[:-1])]

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        tokens, heads, dim = mixed.shape
        it = self._rotation
        it.tokens, it.real, it.head_dim = tokens, slots.shape[0], dim
        it.kv_heads = self._cache.kv_heads
        it.heads = heads = heads - 2 * self._cache.kv_heads
        queries = torch.empty(tokens, heads, dim, dtype=mixed.dtype)
        it.mixed, it.queries = mixed.data_ptr(), queries.data_ptr()
        it.cos, it.sin = turn.cos.data_ptr(), turn.sin.data_ptr()
        it.positions, it.slots = turn.positions.data_ptr(), slots.data_ptr()
        it.keys, it.values = self._pointers[layer]
        if norms is None:
            it.head_norms = None
        else:
            it.head_norms, it.eps = norms.weight.data_ptr(), norms.eps
        self._library.rotate(self._at_rotation, self._dtype, self._threads)
        return queries

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        it = self._attention
        if self._told is not batch:
            it.tables, it.first_tokens = (
                batch.block_tables.data_ptr(),
                batch.first_tokens.data_ptr(),
            )
            it.num_tokens = batch.num_tokens.data_ptr()
            it.context_tokens = batch.context_tokens.data_ptr()
            it.sequences, it.table_width = batch.block_tables.shape
            it.block_size, it.kv_heads = self._cache.block_size, self._cache.kv_heads
            self._told = batch
        tokens, it.heads, it.head_dim = queries.shape
        it.sliding_window = sliding_window
        out = torch.empty_like(queries)
        real = batch.slots.shape[0]
        if real < tokens:
            out[real:] = 0
        it.queries, it.out = queries.data_ptr(), out.data_ptr()
        it.keys, it.values = self._pointers[layer]
        self._library.attend(self._at_attention, self._dtype, self._threads)
        return out

    def _pack(self, given: Tensor | Quantized, bias: Tensor | None, *, gated: bool) -> _Packed:
        weight = given.values if isinstance(given, Quantized) else given
        rows, width = weight.shape
        weight = weight.contiguous()
        library, dtype = self._library, DTYPES[weight.dtype]
        packed = torch.empty(library.packed_size(rows, width, gated, dtype), dtype=weight.dtype)
        library.huge_pages(packed.data_ptr(), packed.nbytes)
        library.pack(weight.data_ptr(), packed.data_ptr(), rows, width, gated, dtype, self._threads)
        columns = torch.empty(library.num_columns(rows, gated), dtype=torch.int64)
        library.columns(columns.data_ptr(), rows, gated)
        # columns that stand for no row come out of nothing and go nowhere
        columns = columns.clamp(min=0)
        offset = None if bias is None else bias.float()[columns]
        if not isinstance(given, Quantized):
            return _Packed(packed, rows, width, offset)
        totals = weight.sum(1, dtype=torch.int32)[columns]
        return _Packed(packed, rows, width, offset, given.scales.float()[columns], totals)


class _Packed:
    """A weight in panels; its bias and, of 8 bits, scales and totals in the order of their columns."""

    __slots__ = ("at", "at_bias", "at_scales", "at_totals", "kept", "rows", "weight", "width")

    def __init__(
        self,
        weight: Tensor,
        rows: int,
        width: int,
        bias: Tensor | None,
        scales: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> None:
        self.weight, self.rows, self.width = weight, rows, width
        self.kept = bias, scales, totals
        self.at = weight.data_ptr()
        self.at_bias, self.at_scales, self.at_totals = (
            None if each is None else each.data_ptr() for each in self.kept
        )


class _Product:
    """What the three kinds of products share."""

    __slots__ = ("_library", "_packed", "_threads")

    def __init__(self, library: Library, packed: _Packed, threads: int) -> None:
        self._library, self._packed, self._threads = library, packed, threads

    def _run(self, x: Tensor, out: Tensor, after: int, more: int | None, wide: bool) -> None:
        it = self._packed
        assert x.shape[1] == it.width
        assert x.is_contiguous()
        at, to, rows, dtype = x.data_ptr(), out.data_ptr(), x.shape[0], DTYPES[x.dtype]
        sizes = rows, it.width, it.rows
        if it.at_scales is None:
            self._library.linear(
                at, it.at, it.at_bias, more, to, *sizes, after, wide, dtype, self._threads
            )
            return
        scales, totals = it.at_scales, it.at_totals
        self._library.linear8(
            at, it.at, scales, totals, it.at_bias, more, to, *sizes, after, dtype, self._threads
        )


class _Linear(_Product):
    """Implements Linear."""

    __slots__ = ()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See Linear."""
        out = torch.empty(x.shape[0], self._packed.rows, dtype=x.dtype)
        if residual is None:
            self._run(x, out, PLAIN, None, False)
        else:
            self._run(x, out, ADD, residual.data_ptr(), False)
        return out


class _Gated(_Product):
    """Implements RowWise."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """See Device.pack_gated."""
        out = torch.empty(x.shape[0], self._packed.rows // 2, dtype=x.dtype)
        self._run(x, out, GATE, None, False)
        return out


class _Head(_Product):
    """Implements Head. Logits of many rows are the largest tensor of a step; new memory for them would cost a tenth of it."""

    __slots__ = ("_kept",)

    def __init__(self, library: Library, packed: _Packed, threads: int) -> None:
        super().__init__(library, packed, threads)
        self._kept = torch.empty(0, packed.rows)

    def __call__(self, x: Tensor) -> Tensor:
        """See Head."""
        rows = x.shape[0]
        if self._kept.shape[0] < rows:
            self._kept = torch.empty(rows, self._packed.rows)
        out = self._kept[:rows]
        self._run(x, out, PLAIN, None, True)
        return out

    def embed(self, token_ids: Tensor) -> Tensor:
        """See Head."""
        count, it = token_ids.shape[0], self._packed
        out = torch.empty(count, it.width, dtype=it.weight.dtype)
        dtype = DTYPES[out.dtype]
        at, to, sizes = token_ids.data_ptr(), out.data_ptr(), (count, it.width, it.rows)
        if not self._library.rows(it.at, at, to, *sizes, dtype, self._threads):
            raise IndexError(f"a token id lies outside the vocabulary of {it.rows}")
        return out
