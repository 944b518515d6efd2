"""Calls the Triton kernels: chooses tiles by the model's sizes alone, and lays out a step's attention as work for programs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from xllm_py.device.base import AttentionBatch, HeadNorms, Turn
from xllm_py.device.cuda import kernels
from xllm_py.device.paged import PagedCache
from xllm_py.device.torch_attention import WINDOW

_ROWS = 64  # of a tile: a whole instruction of the tensor cores, also for one token
_KEYS = 64  # of a step through a window
_LEAST = 16  # numbers of a product's side that Triton takes
_FEW_PROGRAMS = 128  # a matrix with fewer columns than so many tiles is cut finer
_PIECE = 1024


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight, [columns, width], and what its product is multiplied with and added to."""

    values: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None  # of 8-bit values, one a column


def linear(x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
    """See Device.pack_linear; x: [rows, width]."""
    columns, width = matrix.values.shape
    out = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
    int8 = matrix.scales is not None
    peaks = out
    if int8:
        x, peaks = _in_8_bits(x)
    across = 128
    while across > 32 and columns < across * _FEW_PROGRAMS:
        across //= 2
    grid = (triton.cdiv(x.shape[0], _ROWS), triton.cdiv(columns, across))
    kernels.linear[grid](
        out,
        x.contiguous(),
        matrix.values,
        out if matrix.bias is None else matrix.bias,
        out if residual is None else residual,
        out if matrix.scales is None else matrix.scales,
        peaks,
        x.shape[0],
        columns,
        width,
        INT8=int8,
        HAS_BIAS=matrix.bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=_ROWS,
        COLUMNS=across,
        DEPTH=32 if x.dtype is torch.float32 else 64,
    )
    return out


def _in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers up to 127, and what a 1 of each stands for; row by row, so exact in any company."""
    wide = x.float()
    peaks = wide.abs().amax(-1)
    factors = (torch.tensor(127.0) / peaks).nan_to_num(0.0, posinf=0.0)
    return (wide * factors[:, None]).round().to(torch.int8), peaks / 127.0


def gated(both: Tensor) -> Tensor:
    """silu(gate) * up; both: [rows, 2 * width], gate first."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    if rows:
        kernels.gated[(rows, triton.cdiv(width, _PIECE))](out, both, width, PIECE=_PIECE)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See Device.norm."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        grid = (x.numel() // width,)
        kernels.rms_norm[grid](out, x, weight, eps, width, WIDE=triton.next_power_of_2(width))
    return out


def rotate_and_store(
    mixed: Tensor, cache: PagedCache, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None
) -> Tensor:
    """See Device.rotate_and_store; everything lies where the kernels run."""
    tokens, every, dim = mixed.shape
    heads = every - 2 * cache.kv_heads
    queries = torch.empty(tokens, heads, dim, dtype=mixed.dtype, device=mixed.device)
    if tokens:
        kernels.rotate_and_store[(tokens, every)](
            queries,
            cache.keys[layer],
            cache.values[layer],
            mixed.contiguous(),
            turn.cos,
            turn.sin,
            turn.positions,
            slots,
            mixed if norms is None else norms.weight,
            0.0 if norms is None else norms.eps,
            slots.shape[0],
            HEADS=heads,
            KV_HEADS=cache.kv_heads,
            DIM=dim,
            WIDE=triton.next_power_of_2(dim),
            NORMED=norms is not None,
        )
    return queries


@dataclass(frozen=True, slots=True)
class _Work:
    """Of one step, for layers of one sliding window and number of heads."""

    tables: Tensor
    items: Tensor  # see kernels.attend
    merges: Tensor  # see kernels.merge
    num_states: int


class Attention:
    """`attend` of one cache. What a step looks up is made once for all its layers."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._batch: AttentionBatch | None = None
        self._work: dict[tuple[int, int], _Work] = {}

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        heads, kv_heads, dim = queries.shape[1], self._cache.kv_heads, queries.shape[2]
        rows = max(_ROWS, triton.next_power_of_2(heads // kv_heads))
        wide = max(_LEAST, triton.next_power_of_2(dim))
        work = self._work_of(batch, sliding_window, rows * kv_heads // heads)
        out = torch.zeros_like(queries)
        sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDE": wide, "ROWS": rows}
        states = torch.empty(
            (work.num_states, kv_heads, rows, wide + 2), dtype=torch.float32, device=queries.device
        )
        kernels.attend[(work.items.shape[0], kv_heads)](
            out,
            states,
            queries,
            keys,
            values,
            work.tables,
            work.items,
            dim**-0.5,
            sliding_window,
            work.tables.shape[1],
            **sizes,
            KEYS=_KEYS,
            BLOCK_SIZE=self._cache.block_size,
            WINDOW=WINDOW,
            num_stages=1 if queries.dtype is torch.float32 else 2,
            enable_fp_fusion=False,
        )
        if work.num_states:
            grid = (work.merges.shape[0], kv_heads)
            kernels.merge[grid](out, states, work.merges, **sizes, enable_fp_fusion=False)
        return out

    def _work_of(self, batch: AttentionBatch, sliding: int, tokens: int) -> _Work:
        """tokens: of one tile."""
        if self._batch is not batch:
            self._batch, self._work = batch, {}
        found = self._work.get((sliding, tokens))
        if found is None:
            items, merges = lay_out(batch, sliding, tokens)
            at = self._cache.keys[0].device
            found = self._work[sliding, tokens] = _Work(
                tables=batch.block_tables.to(at, non_blocking=True),
                items=items.to(at, non_blocking=True),
                merges=merges.to(at, non_blocking=True),
                num_states=int(merges[:, 1].sum()),
            )
        return found


def lay_out(batch: AttentionBatch, sliding: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(items of kernels.attend, tiles of kernels.merge): tiles of up to so many tokens of one sequence.

    A sequence that is one tile is decoding: each of its windows is an item, so that few of them fill the device. The tiles of a prompt are many,
    and each goes through its windows by itself.
    """
    counts = batch.num_tokens.numpy()
    num_tiles = -(-counts // tokens)
    sequence = np.repeat(np.arange(len(counts)), num_tiles)
    start = (
        np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    ) * tokens
    count = np.minimum(tokens, counts[sequence] - start)
    first = batch.first_tokens.numpy()[sequence] + start
    position = batch.context_tokens.numpy()[sequence] - counts[sequence] + start
    seen_from = np.maximum(0, position - sliding + 1) if sliding else np.zeros_like(position)
    begin, end = seen_from // WINDOW, (position + count - 1) // WINDOW + 1
    is_split = (num_tiles[sequence] == 1) & (end - begin > 1)
    parts = np.where(is_split, end - begin, 1)
    tile = np.repeat(np.arange(len(sequence)), parts)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    split = is_split[tile]
    place = np.where(split, np.cumsum(split) - 1, -1)
    window = begin[tile] + nth
    items = np.stack(
        [
            sequence[tile],
            first[tile],
            count[tile],
            position[tile],
            window,
            np.where(split, window + 1, end[tile]),
            place,
        ],
        axis=1,
    )
    places = parts[is_split]
    merges = np.stack(
        [np.cumsum(places) - places, places, first[is_split], count[is_split]], axis=1
    )
    return torch.from_numpy(items.astype(np.int32)), torch.from_numpy(merges.astype(np.int32))
