"""Tokens chosen from rows of logits, on the host: the oracle of the devices' own kernels, and what devices without one use.

Called by device/cpu/torch_kernels and by the sampler's tests. A token weighs exp((logit - highest) / temperature), in float64.

Nothing is sorted for a cut but one bucket: weights fall into buckets by their leading bits, whose order is that of the numbers, and the cut goes
through one of them. The order is (weight descending, id ascending).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xllm_py.device.base import Drawing

_BLOCK = 512  # tokens whose weights are summed before one of them is looked for
_SHIFT = 46  # of a float64: its exponent and 6 bits of its fraction stay


def best(logits: Tensor) -> Tensor:
    """See Device.best. The two extremes tell whether all are finite, at a tenth of the cost of asking each."""
    lowest, highest = logits.aminmax(dim=-1)
    sound = torch.isfinite(lowest) & torch.isfinite(highest)
    # numpy's promises the first of equal ones, torch's does not
    return torch.stack([torch.from_numpy(logits.numpy().argmax(-1)), sound.long()], dim=-1)


def draw(logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
    """See Device.draw."""
    size = logits.shape[1]
    padded = torch.zeros(-(-size // _BLOCK) * _BLOCK, dtype=torch.float64)
    found = []
    for each in wanted:
        _weigh(logits[each.row], each, padded[:size])
        if each.weights is not None:
            each.weights.copy_(padded[:size])
        found.append(_pick(padded.numpy(), each.numbers))
    return found


def _weigh(logits: Tensor, wanted: Drawing, out: Tensor) -> None:
    """Fill in what each token weighs after the cuts; the highest weighs 1."""
    scaled = (logits - logits.max()).div_(wanted.temperature)
    out.copy_(scaled).exp_()
    weights = out.numpy()
    if wanted.min_p:
        weights *= weights >= wanted.min_p
    keep_most(weights, wanted.top_k)
    keep_share(weights, wanted.top_p)


def _pick(padded: NDArray[np.float64], numbers: NDArray[np.float64]) -> list[int]:
    """A token for each number, from the weights: first the block, then the token in it."""
    blocks = padded.reshape(-1, _BLOCK)
    reached = blocks.sum(axis=1).cumsum()
    wanted = numbers * reached[-1]
    # here and below: rounding could point past the last one with weight; it is the last step of the ladder
    last = np.searchsorted(reached, reached[-1])
    found = np.minimum(np.searchsorted(reached, wanted, side="right"), last).tolist()
    tokens = []
    for block, number in zip(found, wanted.tolist(), strict=True):
        ladder = blocks[block].cumsum() + (reached[block - 1] if block else 0.0)
        inside = int(np.searchsorted(ladder, number, side="right"))
        tokens.append(block * _BLOCK + min(inside, int(np.searchsorted(ladder, ladder[-1]))))
    return tokens


def keep_most(weights: NDArray[np.float64], most: int) -> None:
    """Zero in place all but the `most` greatest of one row of float64, none negative, none above 1."""
    if most >= len(weights):
        return
    buckets = weights.view(np.int64) >> _SHIFT
    reached = np.bincount(buckets)[::-1].cumsum()
    place = int(np.searchsorted(reached, most))
    inside = np.sort(weights[buckets == len(reached) - 1 - place])[::-1]
    ahead = int(reached[place - 1]) if place else 0
    _keep(weights, inside, most - ahead)


def keep_share(weights: NDArray[np.float64], share: float) -> None:
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


def _keep(weights: NDArray[np.float64], inside: NDArray[np.float64], count: int) -> None:
    """inside: the weights of the bucket that is cut, descending; `count` of them stay, with all that are greater."""
    least = inside[count - 1]
    spare = count - int(np.count_nonzero(inside > least))
    equal = np.flatnonzero(weights == least)
    weights *= weights >= least
    weights[equal[spare:]] = 0.0
