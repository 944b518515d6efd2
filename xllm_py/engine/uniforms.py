"""The random numbers of sampling: one per (seed, choice, position), from a counter, so that none has to be remembered or moved.

Called by the sampler, for all tokens of a step at once. Source: Salmon et al. 2011, Philox 4x32-10. The tests hold it against
the generator's published answers and against plain integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[
    np.uint64
]  # 32-bit words, each in 64 bits, so that a product of two does not overflow

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_PURPOSE_SAMPLE = np.uint64(0)  # counters of other uses (speculation) will differ here


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> Words:
    """Random words, [4, n], from four counter words and two key words of n numbers each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (right >> _HALF) ^ c1 ^ k0, right & _MASK
        c2, c3 = (left >> _HALF) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(
    seeds: NDArray[np.int64], choices: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 bits, one per token; all arrays have one entry per token."""
    keys = seeds.astype(np.uint64)
    purpose = np.full_like(keys, _PURPOSE_SAMPLE)
    counter = (
        positions.astype(np.uint64) & _MASK,
        choices.astype(np.uint64) & _MASK,
        purpose,
        np.zeros_like(keys),
    )
    high, low, _, _ = philox(counter, (keys & _MASK, keys >> _HALF))
    numbers: NDArray[np.float64] = ((high << np.uint64(21)) | (low >> np.uint64(11))) / 2.0**53
    return numbers
