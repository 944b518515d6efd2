"""The sampler as one call, and its generator on plain integers: the slow oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from xllm_py.core.plan import RowStart
from xllm_py.engine.sampler import Sampler

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PURPOSE_SAMPLE = 0


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


def sample(logits: torch.Tensor, rows: Sequence[RowStart], positions: Sequence[int]) -> list[int]:
    """One token per row of a fresh sampler; each start gets a row of its own."""
    sampler = Sampler(max_seqs=len(rows), vocab_size=logits.shape[1])
    for number, start in enumerate(rows):
        sampler.start(dataclasses.replace(start, row=number))
    drawn = sampler.choose(logits, range(len(rows)), positions, [1] * len(rows))
    return drawn.token_ids
