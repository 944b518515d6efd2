"""From logits to tokens. A pure function of (logits of one row, seed, choice, position), the same in any batch, on any instance.

Greedy takes the highest logit, ties to the lowest id. Otherwise one uniform number per token, from a counter-based generator,
picks from the cumulative distribution over the vocabulary in id order; top-k, top-p and min-p cut it first, ties by lower id.
Sources: Salmon et al. 2011 (Philox 4x32-10); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xllm_py.core.plan import RowStart

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PURPOSE_SAMPLE = 0  # counters of other uses (speculation) will differ here


def philox(counter: Sequence[int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit random words from four counter words and two key words."""
    c0, c1, c2, c3 = (word & _MASK for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & _MASK,
            (left >> 32) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """In [0, 1), 53 bits: the one random number of a token."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    high, low, _, _ = philox((position, choice, _PURPOSE_SAMPLE, 0), key)
    return ((high << 21) | (low >> 11)) / (1 << 53)


def sample(logits: Tensor, rows: Sequence[RowStart], positions: Sequence[int]) -> list[int]:
    """One token per row. logits: [rows, vocabulary] float32."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen = logits if len(drawn) == len(rows) else logits[torch.tensor(drawn)]
        picked = _draw(chosen, [rows[i] for i in drawn], [positions[i] for i in drawn])
        for index, token in zip(drawn, picked, strict=True):
            tokens[index] = token
    return tokens


def _draw(logits: Tensor, rows: list[RowStart], positions: list[int]) -> list[int]:
    temperatures = torch.tensor([[row.sampling.temperature] for row in rows])
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
    weights = scaled.double().exp_()  # unnormalised: the highest is 1
    lowest = torch.tensor([[row.sampling.min_p] for row in rows], dtype=torch.float64)
    weights.masked_fill_(weights < lowest, 0.0)
    size = logits.shape[1]
    params = [row.sampling for row in rows]
    cut = [i for i, each in enumerate(params) if each.top_p < 1 or 0 < each.top_k < size]
    if cut:
        at = torch.tensor(cut)
        weights[at] = _cut(weights[at], [rows[i] for i in cut])
    ladder = weights.cumsum(-1)
    totals = ladder[:, -1:].contiguous()
    drawn = [
        uniform(row.sampling.seed, row.choice, at) for row, at in zip(rows, positions, strict=True)
    ]
    targets = torch.tensor(drawn, dtype=torch.float64).unsqueeze(1) * totals
    picked = torch.searchsorted(ladder, targets, right=True).squeeze(1)
    # rounding could point past the last token with weight; it is the last step of the ladder
    last = torch.searchsorted(ladder, totals).squeeze(1)
    result: list[int] = torch.minimum(picked, last).tolist()
    return result


def _cut(weights: Tensor, rows: list[RowStart]) -> Tensor:
    """Zero what top-k and top-p leave out. weights: [rows, vocabulary] float64; order is (weight descending, id)."""
    ordered, ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    size = weights.shape[1]
    most = torch.tensor([[row.sampling.top_k if row.sampling.top_k > 0 else size] for row in rows])
    ordered.masked_fill_(torch.arange(size).unsqueeze(0) >= most, 0.0)
    ladder = ordered.cumsum(-1)
    before = ladder - ordered  # the mass ahead of each; the first is always kept
    share = torch.tensor([[row.sampling.top_p] for row in rows], dtype=torch.float64)
    # the last step of the ladder, because sum() splits a single long row between threads
    ordered.masked_fill_(before >= share * ladder[:, -1:], 0.0)
    return torch.zeros_like(weights).scatter_(-1, ids, ordered)
