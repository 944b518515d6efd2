"""How likely tokens were: log-softmax of rows of logits, of the token itself and of the likeliest ones.

Called by the sampler for drawn tokens and by the worker for those of a prompt. It never changes the logits. What is said of a row
depends on nothing but the row: the sum over the vocabulary is made row by row in float64, where no
thread splits it, and each answer is rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm_py.base.logprob import TokenLogprob

_SLICE = 8  # rows held in float64 at once; few, so that memory is used again


def judge(
    logits: Tensor, at: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    """One answer per token: token i was judged by row at[i], with the tops[i] likeliest ids, ties by lower id.

    logits: [rows, vocabulary] float32. A token whose logit is minus infinity cannot come; it is not among the likeliest.
    """
    found: list[TokenLogprob | None] = [None] * len(tokens)
    wanted: dict[int, list[int]] = {}
    for index, row in enumerate(at):
        wanted.setdefault(row, []).append(index)
    rows = list(wanted)
    for begin in range(0, len(rows), _SLICE):
        some = rows[begin : begin + _SLICE]
        chosen = logits[torch.tensor(some)]
        highest = chosen.amax(-1, keepdim=True)
        weights = (chosen - highest).double().exp_().numpy()
        totals = [float(np.log(row.sum())) for row in weights]
        most = min(max(tops[i] for row in some for i in wanted[row]), logits.shape[1])
        likeliest = _likeliest(chosen, most)
        away = chosen.sub_(highest).numpy()
        for place, row in enumerate(some):
            for index in wanted[row]:
                ids = likeliest[place][: tops[index]]
                scores = away[place, [tokens[index], *ids]].astype(np.float64) - totals[place]
                own, *others = scores.astype(np.float32).tolist()
                found[index] = TokenLogprob(
                    logprob=own, top_ids=tuple(ids.tolist()), top_logprobs=tuple(others)
                )
    return [each for each in found if each is not None]


def _likeliest(logits: Tensor, count: int) -> list[np.ndarray]:
    """Per row the ids of the `count` highest logits, highest first, lower ids first among equals; none of minus infinity."""
    if not count:
        return [np.empty(0, dtype=np.int64)] * len(logits)
    least = logits.topk(count, dim=-1).values[:, -1:].numpy()
    found = []
    for row, bound in zip(logits.numpy(), least, strict=True):
        ids = np.flatnonzero((row >= bound) & (row > -np.inf))
        found.append(ids[np.argsort(-row[ids], kind="stable")[:count]])
    return found
