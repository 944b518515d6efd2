"""Triton kernels that draw tokens: weights, cuts by number (top-k), share (top-p) and least weight (min-p), and the choice itself.

A row is one program's, which goes through it in pieces of a fixed size, so its bits depend on nothing but the row. As device/draws.py, with weights
in float32; sums are float64. Nothing is sorted: the bound of a cut is found by halving the numbers between 0 and 1, whose order is that of their
bits. Launched by device/cuda/drawing.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, which nothing outweighs
_HALVINGS = tl.constexpr(30)  # until one number is left of so many


@triton.jit
def weigh(weights, logits, rows, scales, leasts, size, PIECE: tl.constexpr):
    """exp((logit - highest) / temperature) of a row, nothing below its least weight. scales: log2(e) / temperature."""
    program = tl.program_id(0)
    here = logits + tl.load(rows + program) * size
    there = weights + program.to(tl.int64) * size
    scale, least = tl.load(scales + program), tl.load(leasts + program)
    peaks = tl.full([PIECE], float("-inf"), tl.float32)
    for begin in range(0, size, PIECE):
        at = begin + tl.arange(0, PIECE)
        peaks = tl.maximum(peaks, tl.load(here + at, mask=at < size, other=float("-inf")))
    peak = tl.max(peaks)
    for begin in range(0, size, PIECE):
        at = begin + tl.arange(0, PIECE)
        x = tl.load(here + at, mask=at < size, other=float("-inf"))
        weight = tl.minimum(tl.exp2((x - peak) * scale), 1.0)
        tl.store(there + at, tl.where(weight >= least, weight, 0.0), mask=at < size)


@triton.jit
def _amount(row, size, bound, OF_WEIGHT: tl.constexpr, PIECE: tl.constexpr):
    """Of those that weigh at least so much, as bits: their weight, or their number."""
    amounts = tl.zeros([PIECE], tl.float64)
    for begin in range(0, size, PIECE):
        at = begin + tl.arange(0, PIECE)
        weight = tl.load(row + at, mask=at < size, other=0.0)
        each = weight.to(tl.float64) if OF_WEIGHT else tl.full([PIECE], 1.0, tl.float64)
        amounts += tl.where(weight.to(tl.int32, bitcast=True) >= bound, each, 0.0)
    return tl.sum(amounts)


@triton.jit
def keep(weights, enoughs, size, OF_WEIGHT: tl.constexpr, PIECE: tl.constexpr):
    """Zero all of a row but the greatest that together reach enough: of their number, or this share of their weight. Of equal ones the first stay."""
    program = tl.program_id(0)
    row = weights + program.to(tl.int64) * size
    enough = tl.load(enoughs + program)
    whole = _amount(row, size, 1, OF_WEIGHT, PIECE)
    if OF_WEIGHT:
        enough = enough * whole
    if enough < whole:
        # those that weigh at least `low` are enough, those that weigh at least `high` are not
        low, high = 1, ONE + 1
        for _ in range(_HALVINGS):
            middle = low + (high - low) // 2
            reached = _amount(row, size, middle, OF_WEIGHT, PIECE) >= enough
            low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
        lacking = enough - _amount(row, size, low + 1, OF_WEIGHT, PIECE)
        if OF_WEIGHT:
            lacking = lacking / low.to(tl.float32, bitcast=True).to(tl.float64)
        spare = tl.ceil(lacking).to(tl.int32)  # of those that weigh just that
        seen = tl.full([], 0, tl.int32)
        for begin in range(0, size, PIECE):
            at = begin + tl.arange(0, PIECE)
            weight = tl.load(row + at, mask=at < size, other=0.0)
            bits = weight.to(tl.int32, bitcast=True)
            equal = (bits == low).to(tl.int32)
            rank = seen + tl.cumsum(equal, 0)
            kept = (bits > low) | ((equal > 0) & (rank <= spare))
            tl.store(row + at, tl.where(kept, weight, 0.0), mask=at < size)
            seen += tl.sum(equal)


@triton.jit
def pick(tokens, weights, rows, numbers, size, PIECE: tl.constexpr):
    """For each number the first token of its row whose ladder of weights is above it. Rounding could point past the last one with weight: then it is that one."""
    program = tl.program_id(0)
    row = weights + tl.load(rows + program) * size
    whole = tl.full([], 0.0, tl.float64)
    for begin in range(0, size, PIECE):
        at = begin + tl.arange(0, PIECE)
        whole += tl.sum(tl.load(row + at, mask=at < size, other=0.0).to(tl.float64))
    wanted = tl.load(numbers + program) * whole
    below = tl.full([], 0.0, tl.float64)
    token, last = tl.full([], -1, tl.int32), tl.full([], 0, tl.int32)
    for begin in range(0, size, PIECE):
        at = begin + tl.arange(0, PIECE)
        weight = tl.load(row + at, mask=at < size, other=0.0)
        ladder = below + tl.cumsum(weight.to(tl.float64), 0)
        heavy = weight > 0
        last = tl.maximum(last, tl.max(tl.where(heavy, at, -1)))
        reached = below + tl.sum(weight.to(tl.float64))
        first = tl.min(tl.where(heavy & (ladder > wanted), at, size))
        # the ladder's own rounding may leave it below what the sum of the piece reaches
        here = tl.where(first < size, first, last)
        token = tl.where((token < 0) & (reached > wanted), here, token)
        below = reached
    tl.store(tokens + program, tl.where(token < 0, last, token).to(tl.int64))
