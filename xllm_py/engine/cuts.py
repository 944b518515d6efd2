"""Which tokens of a distribution stay: the likeliest ones by number (top-k) or by their share of the whole (top-p).

Called by the sampler, row by row. The order is (weight descending, id ascending). Nothing is sorted but one bucket: weights fall into
buckets by their leading bits, whose order is that of the numbers, and the cut goes through one of them.
"""

from __future__ import annotations

import numpy as np

_SHIFT = 46  # of a float64: its exponent and 6 bits of its fraction stay


def keep_most(weights: np.ndarray, most: int) -> None:
    """Zero in place all but the `most` greatest of one row of float64, none negative, none above 1."""
    if most >= len(weights):
        return
    buckets = weights.view(np.int64) >> _SHIFT
    reached = np.bincount(buckets)[::-1].cumsum()
    place = int(np.searchsorted(reached, most))
    inside = np.sort(weights[buckets == len(reached) - 1 - place])[::-1]
    ahead = int(reached[place - 1]) if place else 0
    _keep(weights, inside, most - ahead)


def keep_share(weights: np.ndarray, share: float) -> None:
    """Zero in place all but the greatest that together make `share` of the sum; the one that reaches it stays."""
    if share >= 1:
        return
    buckets = weights.view(np.int64) >> _SHIFT
    reached = np.bincount(buckets, weights)[::-1].cumsum()
    wanted = share * reached[-1]
    place = int(np.searchsorted(reached, wanted))
    inside = np.sort(weights[buckets == len(reached) - 1 - place])[::-1]
    ladder = inside.cumsum() + (reached[place - 1] if place else 0.0)
    # by rounding the last of them may fall short of what their bucket reached
    _keep(weights, inside, min(int(np.searchsorted(ladder, wanted)) + 1, len(inside)))


def _keep(weights: np.ndarray, inside: np.ndarray, count: int) -> None:
    """inside: the weights of the bucket that is cut, descending; `count` of them stay, with all that are greater."""
    least = inside[count - 1]
    spare = count - int(np.count_nonzero(inside > least))
    equal = np.flatnonzero(weights == least)
    weights *= weights >= least
    weights[equal[spare:]] = 0.0
