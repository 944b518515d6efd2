"""Triton kernels of the cuda device. A row's bits depend on nothing but the row: tiles, windows and their order are fixed, never chosen by the batch.

The same code with the same tile computes a token that is decoded and one that is prefilled, and no product is contracted into a sum
(`enable_fp_fusion=False` where that could differ), so that PD gives the bits of one instance. In Triton's interpreter (TRITON_INTERPRET=1 before this is imported) they run
on tensors of the host; tests/device/cuda does that. Launched by device/cuda/launch.

work of `attend`: [items, 7] int32: sequence, first token, number of tokens, position of the first, first window, the one behind the last, and where in
`states` the state goes; -1: the result goes to `out`. states: [places, KV heads, ROWS, WIDE + 2] float32.

Source of the attention: Dao et al. 2022, FlashAttention, and Hong et al. 2023, FlashDecoding++, section 2, for the split over keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

_IN_INTERPRETER = tl.constexpr(
    triton.knobs.runtime.interpret
)  # where bfloat16 can be cast, and nothing else
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a row that sees nothing keeps zeros


@triton.jit
def _dot(left, right):
    """Their product in float32."""
    if _IN_INTERPRETER:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _narrow(x, kind: tl.constexpr):
    """float32 numbers in a narrower kind, rounded to the nearest, of two the even one."""
    if _IN_INTERPRETER and kind == tl.bfloat16:  # whose own cast cuts off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(kind)


@triton.jit
def linear(
    out,
    x,
    weight,
    bias,
    residual,
    scales,
    peaks,
    num_rows,
    num_columns,
    width,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = x @ weight.T * scales * peaks + bias + residual: x [rows, width], weight [columns, width]; scales and peaks with INT8 only."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    places = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.int32 if INT8 else tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + rows[:, None].to(tl.int64) * width + depth[None, :],
            mask=(rows[:, None] < num_rows) & (depth[None, :] < width),
            other=0,
        )
        right = tl.load(
            weight + columns[None, :].to(tl.int64) * width + depth[:, None],
            mask=(columns[None, :] < num_columns) & (depth[:, None] < width),
            other=0,
        )
        if INT8:
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        else:
            total += _dot(left, right)
    done = total.to(tl.float32)
    if INT8:
        by_column = tl.load(scales + columns, mask=columns < num_columns, other=0.0)
        by_row = tl.load(peaks + rows, mask=rows < num_rows, other=0.0)
        done = done * by_column[None, :] * by_row[:, None]
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=columns < num_columns, other=0.0)
        done += offset.to(tl.float32)[None, :]
    done = _narrow(done, out.dtype.element_ty)
    if HAS_RESIDUAL:
        before = tl.load(residual + places, mask=inside, other=0.0)
        done = _narrow(before.to(tl.float32) + done.to(tl.float32), out.dtype.element_ty)
    tl.store(out + places, done, mask=inside)


@triton.jit
def gated(out, both, width, PIECE: tl.constexpr):
    """silu(gate) * up; both: [rows, 2 * width], gate first."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    gate = tl.load(both + row * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=at < width, other=0.0)
    opened = _narrow(gate / (1.0 + tl.exp(-gate)), out.dtype.element_ty).to(tl.float32)
    done = _narrow(opened * up.to(tl.float32), out.dtype.element_ty)
    tl.store(out + row * width + at, done, mask=at < width)


@triton.jit
def rms_norm(out, x, weight, eps, width, WIDE: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight of a row, in float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    numbers = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / width + eps)
    factor = tl.load(weight + at, mask=at < width, other=0.0)
    kind = out.dtype.element_ty
    normed = factor.to(tl.float32) * _narrow(numbers * scale, kind).to(tl.float32)
    tl.store(out + row * width + at, _narrow(normed, kind), mask=at < width)


@triton.jit
def rotate_and_store(
    queries,
    keys,
    values,
    mixed,
    cos,
    sin,
    positions,
    slots,
    norms,
    eps,
    num_real,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One head of one token: see Device.rotate_and_store. keys and values: the cache of one layer."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, WIDE)
    inside = at < DIM
    kind = queries.dtype.element_ty
    row = mixed + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if head >= HEADS + KV_HEADS:
        if token < num_real:
            slot = tl.load(slots + token)
            place = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
            tl.store(place + at, _narrow(x, kind), mask=inside)
    else:
        # a number of one half turns with the number at the same place of the other
        partner = tl.where(at < DIM // 2, at + DIM // 2, at - DIM // 2)
        y = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
            own = tl.load(norms + head * DIM + at, mask=inside, other=0.0)
            other = tl.load(norms + head * DIM + partner, mask=inside, other=0.0)
            x = own.to(tl.float32) * _narrow(x * scale, kind).to(tl.float32)
            y = other.to(tl.float32) * _narrow(y * scale, kind).to(tl.float32)
            x, y = _narrow(x, kind).to(tl.float32), _narrow(y, kind).to(tl.float32)
        position = tl.load(positions + token)
        along = tl.load(cos + position * DIM + at, mask=inside, other=0.0).to(tl.float32)
        across = tl.load(sin + position * DIM + at, mask=inside, other=0.0).to(tl.float32)
        turned = _narrow(x * along + tl.where(at < DIM // 2, -y, y) * across, kind)
        if head < HEADS:
            tl.store(queries + (token * HEADS + head) * DIM + at, turned, mask=inside)
        elif token < num_real:
            slot = tl.load(slots + token)
            place = keys + (slot * KV_HEADS + head - HEADS) * DIM
            tl.store(place + at, turned, mask=inside)


@triton.jit
def _nothing(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """State of a softmax over no keys: the highest score, the sum of weights, the weighted sum of values."""
    highest = tl.full([ROWS], LOWEST, tl.float32)
    return highest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDE], tl.float32)


@triton.jit
def _place(first, count, kv_head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile's rows: which of its tokens, the head of that token in [tokens, heads], and whether there is such a token."""
    rows = tl.arange(0, ROWS)
    group: tl.constexpr = HEADS // KV_HEADS
    token = rows // group
    head = (first + token).to(tl.int64) * HEADS + kv_head * group + rows % group
    return token, head, token < count


@triton.jit
def _state(states, place, kv_head, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Where the rows of one stored state lie."""
    first = (place.to(tl.int64) * KV_HEADS + kv_head) * ROWS
    return states + (first + tl.arange(0, ROWS)) * (WIDE + 2)


@triton.jit
def _merged(highest, total, sums, other_highest, other_total, other_sums):
    """Two states of a softmax over adjacent keys as one."""
    top = tl.maximum(highest, other_highest)
    mine, theirs = tl.exp(highest - top), tl.exp(other_highest - top)
    sums = sums * mine[:, None] + other_sums * theirs[:, None]
    return top, total * mine + other_total * theirs, sums


@triton.jit
def _window(
    q,
    keys,
    values,
    table,
    start,
    end,
    kv_head,
    where,
    scale,
    sliding,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """State of the softmax over the keys of one window, from nothing. Keys that nobody sees add exact zeros, so leaving them out changes no bit."""
    highest, total, sums = _nothing(ROWS, WIDE)
    at = tl.arange(0, WIDE)
    for begin in range(start, end, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            keys + row[None, :] * DIM + at[:, None],
            mask=there[None, :] & (at[:, None] < DIM),
            other=0.0,
        )
        scores = _dot(q, k) * scale
        seen = there[None, :] & (key[None, :] <= where[:, None])
        if sliding > 0:
            seen = seen & (key[None, :] > where[:, None] - sliding)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        rescale = tl.exp(highest - top)
        weights = tl.exp(scores - top[:, None])
        v = tl.load(
            values + row[:, None] * DIM + at[None, :],
            mask=there[:, None] & (at[None, :] < DIM),
            other=0.0,
        )
        added = _dot(_narrow(weights, v.dtype), v)
        sums = sums * rescale[:, None] + added
        total = total * rescale + tl.sum(weights, 1)
        highest = top
    return highest, total, sums


@triton.jit
def attend(
    out,
    states,
    queries,
    keys,
    values,
    tables,
    work,
    scale,
    sliding,
    table_width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Adjacent tokens of one sequence, one KV head, over some windows in ascending order; work and states: as the module says."""
    item = work + tl.program_id(0) * 7
    kv_head = tl.program_id(1)
    sequence, first, count = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    position, place = tl.load(item + 3), tl.load(item + 6)
    at = tl.arange(0, WIDE)
    token, head, real = _place(first, count, kv_head, HEADS, KV_HEADS, ROWS)
    inside = real[:, None] & (at[None, :] < DIM)
    q = tl.load(queries + head[:, None] * DIM + at[None, :], mask=inside, other=0.0)
    table = tables + sequence.to(tl.int64) * table_width
    highest, total, sums = _nothing(ROWS, WIDE)
    for window in range(tl.load(item + 4), tl.load(item + 5)):
        end = tl.minimum((window + 1) * WINDOW, position + count)
        found, weight, added = _window(
            q,
            keys,
            values,
            table,
            window * WINDOW,
            end,
            kv_head,
            position + token,
            scale,
            sliding,
            KV_HEADS,
            DIM,
            WIDE,
            ROWS,
            KEYS,
            BLOCK_SIZE,
        )
        highest, total, sums = _merged(highest, total, sums, found, weight, added)
    if place < 0:
        done = _narrow(sums / total[:, None], out.dtype.element_ty)
        tl.store(out + head[:, None] * DIM + at[None, :], done, mask=inside)
    else:
        state = _state(states, place, kv_head, KV_HEADS, ROWS, WIDE)
        tl.store(state[:, None] + at[None, :], sums)
        tl.store(state + WIDE, highest)
        tl.store(state + WIDE + 1, total)


@triton.jit
def merge(
    out,
    states,
    merges,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The states of one tile's windows, in ascending order, as `attend` merges them. merges: [tiles, 4] int32: first place, number of places, first token, number of tokens."""
    item = merges + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    place, number = tl.load(item), tl.load(item + 1)
    at = tl.arange(0, WIDE)
    highest, total, sums = _nothing(ROWS, WIDE)
    for nth in range(number):
        state = _state(states, place + nth, kv_head, KV_HEADS, ROWS, WIDE)
        highest, total, sums = _merged(
            highest,
            total,
            sums,
            tl.load(state + WIDE),
            tl.load(state + WIDE + 1),
            tl.load(state[:, None] + at[None, :]),
        )
    _, head, real = _place(tl.load(item + 2), tl.load(item + 3), kv_head, HEADS, KV_HEADS, ROWS)
    done = _narrow(sums / total[:, None], out.dtype.element_ty)
    inside = real[:, None] & (at[None, :] < DIM)
    tl.store(out + head[:, None] * DIM + at[None, :], done, mask=inside)
