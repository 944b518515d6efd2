"""Exact attention over the paged cache in plain torch: fixed, absolute windows of 512 keys, in ascending order.

The softmax is online, in float32, so that a token sees the same sums whether it is prefilled whole, in chunks, or decoded. Windows a token
cannot see add nothing: a probability of exp(-inf) is exactly 0 and a rescale by exp(0) exactly 1. A model's sliding window is a mask over
them and moves none. Used by cpu/torch_kernels, by `apart` where a device has nothing of its own, and behind the simulated npu. What a step looks up is made on the host and
copied to the cache's device once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from xllm_py.device.base import AttentionBatch
from xllm_py.device.paged import PagedCache

WINDOW = 512  # keys of one online-softmax step; absolute, never a function of chunk or block size
QUERY_TILE = 128  # tokens whose scores are held at once
# MKL gives the rows of a float32 product the same bits when there are 4, 8, 12, ... of them; the last one to three rows of an
# odd number, or of a thread's share of it, take another kernel (measured with 1 to 32 threads, 4 to 1,800 rows, AVX2 and AVX-512)
ROWS = 4
# ... and on CPUs with AMX just four rows of 96 or more numbers take one of their own (all of 4 to 256 rows, heads of 64, 96 and 128)
_LEAST_ROWS = 8


@dataclass(frozen=True, slots=True)
class _DecodeWindow:
    """One window of all decoding sequences that reach into it. rows are cache rows of one KV head."""

    sequences: Tensor | None  # which of the decoding ones; None: all
    state: Tensor | None  # their places in the softmax state, sequence x KV head; None: all
    rows: Tensor  # [sequences * kv_heads * WINDOW] int64
    hidden: (
        Tensor | None
    )  # [sequences * kv_heads, 1, WINDOW] bool, true for what is not seen; None: all is


@dataclass(frozen=True, slots=True)
class _Tile:
    """Adjacent tokens of one prompt: their place in the step, and what each window hides from them."""

    start: int
    end: int
    first: (
        int  # the first window that one of the tokens reaches into, counted from the prompt's first
    )
    hidden: list[Tensor | None]  # one per window up to the last token's, [tokens, 1, WINDOW] bool


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One sequence with several tokens in this step."""

    rows: Tensor  # [windows * kv_heads * WINDOW] int64, cache rows of one KV head
    tiles: list[_Tile]


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Where a step's keys and values lie; the same for every layer of one sliding window, so it is made once per step."""

    decoding: Tensor | None  # places of the decoding sequences' tokens in the step
    windows: list[_DecodeWindow]
    prompts: list[_Prompt]


class WindowedAttention:
    """`attend` of one cache. math: the dtype that products of a dtype are computed in."""

    def __init__(self, cache: PagedCache, math: Callable[[torch.dtype], torch.dtype]) -> None:
        self._cache, self._math_dtype = cache, math
        self._lookups: tuple[AttentionBatch, dict[int, _Lookup]] | None = None

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device. Decoding sequences are computed together, prompts one after the other."""
        if self._lookups is None or self._lookups[0] is not batch:
            self._lookups = (batch, {})
        lookup = self._lookups[1].get(sliding_window)
        if lookup is None:
            lookup = self._lookups[1][sliding_window] = self._look_up(batch, sliding_window)
        out = torch.zeros_like(queries)
        if lookup.decoding is not None:
            out[lookup.decoding] = self._decode(queries[lookup.decoding], layer, lookup.windows)
        for prompt in lookup.prompts:
            keys, values = self._gather(layer, prompt.rows)
            for tile in prompt.tiles:
                done = self._prefill(queries[tile.start : tile.end], keys, values, tile)
                out[tile.start : tile.end] = done
        return out

    def _look_up(self, batch: AttentionBatch, sliding: int) -> _Lookup:
        counts = batch.num_tokens.tolist()
        decoding = [i for i, count in enumerate(counts) if count == 1]
        prompts = [i for i, count in enumerate(counts) if count > 1]
        return _Lookup(
            self._there(batch.first_tokens[torch.tensor(decoding)]) if decoding else None,
            self._decode_windows(batch, decoding, sliding),
            [self._prompt(batch, i, sliding) for i in prompts],
        )

    def _decode_windows(
        self, batch: AttentionBatch, decoding: list[int], sliding: int
    ) -> list[_DecodeWindow]:
        if not decoding:
            return []
        tables = batch.block_tables[torch.tensor(decoding)]
        ends = batch.context_tokens[torch.tensor(decoding)]
        starts = (ends - sliding).clamp(min=0) if sliding else torch.zeros_like(ends)
        found = []
        for window in range(int(starts.min()) // WINDOW, -(-int(ends.max()) // WINDOW)):
            # sequences that see nothing of this window take no part; a row's bits do not depend on the others
            reach = (ends > window * WINDOW) & (starts < (window + 1) * WINDOW)
            active = reach.nonzero().flatten()
            if not len(active):
                continue
            every = len(active) == len(decoding)
            state = (
                active[:, None] * self._cache.kv_heads + torch.arange(self._cache.kv_heads)
            ).flatten()
            positions = torch.arange(window * WINDOW, (window + 1) * WINDOW)
            outside = (positions >= ends[active][:, None]) | (positions < starts[active][:, None])
            hidden = outside.repeat_interleave(self._cache.kv_heads, 0)[:, None]
            found.append(
                _DecodeWindow(
                    None if every else self._there(active),
                    None if every else self._there(state),
                    self._there(self._rows(tables[active], positions, outside)),
                    self._there(hidden) if bool(outside.any()) else None,
                )
            )
        return found

    def _prompt(self, batch: AttentionBatch, i: int, sliding: int) -> _Prompt:
        first, count = int(batch.first_tokens[i]), int(batch.num_tokens[i])
        context = int(batch.context_tokens[i])
        seen = max(0, context - count - sliding + 1) if sliding else 0  # from here on
        skipped = seen // WINDOW
        positions = torch.arange(skipped * WINDOW, -(-context // WINDOW) * WINDOW).view(-1, WINDOW)
        table = batch.block_tables[i].expand(positions.shape[0], -1)
        tiles = []
        for start, end in pairwise([*range(0, count, QUERY_TILE), count]):
            where = torch.arange(context - count + start, context - count + end)
            nearest = max(0, int(where[0]) - sliding + 1) // WINDOW - skipped if sliding else 0
            hidden = []
            for keys in positions[nearest : int(where[-1]) // WINDOW + 1 - skipped]:
                masked = keys > where[:, None]
                if sliding:
                    masked |= keys <= where[:, None] - sliding
                hidden.append(self._there(masked[:, None]) if bool(masked.any()) else None)
            tiles.append(_Tile(first + start, first + end, nearest, hidden))
        rows = self._rows(table, positions, positions >= context)
        return _Prompt(self._there(rows), tiles)

    def _there(self, made: Tensor) -> Tensor:
        """Where the cache is."""
        return made.to(self._cache.keys[0].device)

    def _rows(self, tables: Tensor, positions: Tensor, outside: Tensor) -> Tensor:
        """Cache rows of one KV head, in the order (sequence or window, KV head, position); zero rows where `outside`.

        tables: [n, blocks]; positions: [WINDOW] or [n, WINDOW]; outside: [n, WINDOW].
        """
        size, heads = self._cache.block_size, self._cache.kv_heads
        columns = (positions // size).clamp(max=tables.shape[1] - 1).expand(outside.shape)
        slots = tables.long().gather(1, columns) * size + positions % size
        slots = slots.masked_fill(outside, (self._cache.keys[0].shape[0] - 1) * size)
        return (slots[:, None] * heads + torch.arange(heads)[:, None]).flatten()

    def _gather(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [sequences or windows x kv_heads, WINDOW, head_dim], math dtype, zero past the end."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        math, dim = self._math_dtype(keys.dtype), keys.shape[3]
        return (
            keys.view(-1, dim).index_select(0, rows).view(-1, WINDOW, dim).to(math),
            values.view(-1, dim).index_select(0, rows).view(-1, WINDOW, dim).to(math),
        )

    def _decode(self, queries: Tensor, layer: int, windows: list[_DecodeWindow]) -> Tensor:
        """One token of each sequence; queries [sequences, heads, head_dim]."""
        count, heads, dim = queries.shape
        group = heads // self._cache.kv_heads
        rows = _padded(group)
        math = self._math_dtype(queries.dtype)
        grouped = queries.new_zeros(count, self._cache.kv_heads, rows, dim, dtype=math)
        grouped[:, :, :group] = queries.view(count, self._cache.kv_heads, group, dim)
        state = _Softmax(count * self._cache.kv_heads, rows, dim, queries.device)
        for window in windows:
            keys, values = self._gather(layer, window.rows)
            asking = grouped if window.sequences is None else grouped[window.sequences]
            scores = state.scores(asking.flatten(0, 1), keys)
            if window.hidden is not None:
                scores.masked_fill_(window.hidden, -torch.inf)
            state.add(scores, values, window.state)
        result = state.result().view(count, self._cache.kv_heads, rows, dim)[:, :, :group]
        return result.reshape(count, heads, dim).to(queries.dtype)

    def _prefill(self, queries: Tensor, keys: Tensor, values: Tensor, tile: _Tile) -> Tensor:
        """One tile; queries [tokens, heads, head_dim], keys and values [windows x kv_heads, WINDOW, head_dim]."""
        count, heads, dim = queries.shape
        kv_heads = self._cache.kv_heads
        group = heads // kv_heads
        # [kv_heads, tokens * group, dim]: the query heads of a KV head are rows of one product
        grouped = queries.view(count, kv_heads, group, dim).transpose(0, 1).to(keys.dtype)
        grouped = grouped.reshape(kv_heads, count * group, dim)
        padding = _padded(count * group) - count * group
        if padding:
            grouped = torch.nn.functional.pad(grouped, (0, 0, 0, padding))
        state = _Softmax(kv_heads, count * group + padding, dim, queries.device)
        for window, masked in enumerate(tile.hidden, tile.first):
            at = slice(window * kv_heads, (window + 1) * kv_heads)
            scores = state.scores(grouped, keys[at])
            if masked is not None:
                real = scores[:, : count * group].view(kv_heads, count, group, WINDOW)
                real.masked_fill_(masked, -torch.inf)
            state.add(scores, values[at])
        result = state.result()[:, : count * group].reshape(kv_heads, count, group, dim)
        return result.transpose(0, 1).reshape(count, heads, dim).to(queries.dtype)


def _padded(rows: int) -> int:
    """So many rows that a float32 product gives each the bits it has among any others."""
    return max(_LEAST_ROWS, rows + -rows % ROWS)


class _Softmax:
    """Online softmax over windows: running maximum, sum and weighted values, float32.

    batch: sequences x KV heads · rows: query rows of each · the caller adds windows in ascending order.
    """

    def __init__(self, batch: int, rows: int, dim: int, at: torch.device) -> None:
        self._scale = dim**-0.5
        # finite, so that a row which sees nothing of its first window keeps zeros; a real score outweighs it without a trace
        self._highest = torch.full((batch, rows, 1), torch.finfo(torch.float32).min, device=at)
        self._sum = torch.zeros(batch, rows, 1, device=at)
        self._values = torch.zeros(batch, rows, dim, device=at)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [n, rows, dim], keys [n, WINDOW, dim] -> [n, rows, WINDOW] float32, for the caller to mask and to `add`."""
        return torch.bmm(queries, keys.transpose(1, 2)).float().mul_(self._scale)

    def add(self, scores: Tensor, values: Tensor, at: Tensor | None = None) -> None:
        """scores [n, rows, WINDOW], used up; values [n, WINDOW, dim]; at: [n] places in the state, None: all of it.

        -inf hides a key. A window of which a row sees nothing adds nothing to it: its weights are exactly 0, the rescale exactly 1.
        """
        if at is None:
            before, total, sums = self._highest, self._sum, self._values
        else:
            before, total, sums = self._highest[at], self._sum[at], self._values[at]
        highest = torch.maximum(before, scores.amax(-1, keepdim=True))
        rescale = torch.exp(before - highest)
        weights = scores.sub_(highest).exp_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        sums = sums * rescale + torch.bmm(weights.to(values.dtype), values).float()
        if at is None:
            self._highest, self._sum, self._values = highest, total, sums
        else:
            self._highest[at], self._sum[at], self._values[at] = highest, total, sums

    def result(self) -> Tensor:
        """[batch, rows, dim] float32."""
        return self._values / self._sum
