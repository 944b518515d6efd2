"""From logits to tokens. A pure function of (logits of one row, seed, choice, position), the same in any batch, on any instance.

Greedy takes the highest logit, ties to the lowest id. Otherwise one uniform number per token, from a counter-based generator,
picks from the cumulative distribution over the vocabulary in id order; top-k, top-p and min-p cut it first, ties by lower id.
Penalties, biases and bans change the logits before all that (`edits`). Called by the worker. A row's parameters stand in columns,
written when the row gets an owner; each step gathers the rows it needs, and a row pays only for what its request asks.
Sources: Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p); `uniforms` for the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.plan import RowStart
from xllm_py.engine.edits import Edits, apply
from xllm_py.engine.judge import judge
from xllm_py.engine.uniforms import uniforms

PROCESSED = "processed"
_SLICE = 8  # rows whose weights are held in float64 at once; few, so that memory is used again


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was drawn for one step."""

    token_ids: list[int]  # flat, row after row
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # index in token_ids


class Sampler:
    """The rows' parameters and what they have said.

    logprobs_mode: `raw` tells how likely the model found a token, before penalties, bias, temperature and cuts; `processed` how
    likely it was to be drawn.
    """

    def __init__(self, *, max_seqs: int, vocab_size: int, logprobs_mode: str = "raw") -> None:
        self._vocab_size = vocab_size
        self._processed = logprobs_mode == PROCESSED
        self._seeds, self._choices, self._top_ks, self._tops = np.zeros(
            (4, max_seqs), dtype=np.int64
        )
        self._temperatures, self._top_ps, self._min_ps = np.zeros((3, max_seqs))
        self._edits: list[Edits | None] = [None] * max_seqs

    def start(self, start: RowStart) -> None:
        """A row has a new owner; everything of the last one is written over."""
        row, sampling = start.row, start.sampling
        size = self._vocab_size
        self._seeds[row], self._choices[row] = sampling.seed, start.choice
        self._top_ks[row] = min(sampling.top_k, size) if sampling.top_k > 0 else size
        self._tops[row] = sampling.logprobs
        self._temperatures[row] = sampling.temperature
        self._top_ps[row], self._min_ps[row] = sampling.top_p, sampling.min_p
        edits = sampling.penalised or sampling.logit_bias or sampling.min_tokens
        self._edits[row] = Edits(start, size) if edits else None

    def choose(
        self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], draws: Sequence[int]
    ) -> Drawn:
        """draws[i] tokens for row rows[i], for its own choice and the ones after it, at positions[i].

        logits: [rows, vocabulary] float32, finite; they are not changed. The first token of a row is noted as its own.
        """
        tokens: list[list[int]] = [[] for _ in rows]
        scored: dict[int, Tensor] = {}  # place in rows -> what its tokens are judged by
        edited, plain = self._split(rows, positions)
        for group in (plain, edited):
            if not group:
                continue
            whole = group is plain and len(group) == len(rows)
            chosen = logits if whole else logits[torch.tensor(group)]
            if group is edited:
                due = [edit for i in group if (edit := self._edits[rows[i]]) is not None]
                apply(chosen, due, [positions[i] for i in group])
            self._choose(chosen, group, rows, positions, draws, tokens, scored)
        for place, row in enumerate(rows):
            edit = self._edits[row]
            if edit is not None:
                edit.note(tokens[place][0])
        flat = [token for each in tokens for token in each]
        return Drawn(token_ids=flat, logprobs=self._judged(logits, rows, tokens, scored))

    def _split(self, rows: Sequence[int], positions: Sequence[int]) -> tuple[list[int], list[int]]:
        edited: list[int] = []
        plain: list[int] = []
        for place, row in enumerate(rows):
            edit = self._edits[row]
            due = edit is not None and edit.due(positions[place])
            (edited if due else plain).append(place)
        return edited, plain

    def _choose(
        self,
        logits: Tensor,
        group: list[int],
        rows: Sequence[int],
        positions: Sequence[int],
        draws: Sequence[int],
        tokens: list[list[int]],
        scored: dict[int, Tensor],
    ) -> None:
        """Fill in `tokens` for the places in the group, whose logits are the rows given; `scored` in processed mode."""
        hot = self._temperatures[[rows[place] for place in group]] > 0
        greedy, drawn = np.flatnonzero(~hot).tolist(), np.flatnonzero(hot).tolist()
        if greedy:
            whole = len(greedy) == len(group)
            best = (logits if whole else logits[torch.tensor(greedy)]).argmax(-1).tolist()
            for index, token in zip(greedy, best, strict=True):
                place = group[index]
                tokens[place] = [token] * draws[place]
                if self._processed and self._tops[rows[place]] >= 0:
                    scored[place] = logits[index]
        for begin in range(0, len(drawn), _SLICE):
            some = drawn[begin : begin + _SLICE]
            places = [group[index] for index in some]
            numbers = np.array([rows[place] for place in places])
            scaled, weights = self._weights(logits[torch.tensor(some)], numbers)
            if self._processed:
                scaled.masked_fill_(weights == 0, -torch.inf)
                for index, place in enumerate(places):
                    if self._tops[rows[place]] >= 0:
                        scored[place] = scaled[index]
            counts = np.array([draws[place] for place in places])
            picked = self._pick(weights, numbers, np.array([positions[i] for i in places]), counts)
            for place, each in zip(places, picked, strict=True):
                tokens[place] = each

    def _weights(self, logits: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Scaled logits, float32, and what each token weighs after the cuts, float64; the highest weighs 1."""
        temperatures = torch.tensor(self._temperatures[rows], dtype=torch.float32).unsqueeze(1)
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
        weights = scaled.double().exp_()
        lowest = self._min_ps[rows]
        if lowest.any():
            weights.masked_fill_(weights < torch.from_numpy(lowest).unsqueeze(1), 0.0)
        most, shares = self._top_ks[rows], self._top_ps[rows]
        for index in np.flatnonzero((shares < 1) | (most < self._vocab_size)).tolist():
            cut(weights[index].numpy(), int(most[index]), float(shares[index]))
        return scaled, weights

    def _pick(
        self, weights: Tensor, rows: np.ndarray, positions: np.ndarray, counts: np.ndarray
    ) -> list[list[int]]:
        """counts[i] tokens from row i of the weights; each has its own number."""
        ladder = weights.cumsum(-1)
        totals = ladder[:, -1:].contiguous()
        which = np.repeat(np.arange(len(rows)), counts)
        nth = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)
        drawn = np.zeros((len(rows), int(counts.max())))
        owners = rows[which]
        drawn[which, nth] = uniforms(
            self._seeds[owners], self._choices[owners] + nth, positions[which]
        )
        picked = torch.searchsorted(ladder, torch.from_numpy(drawn) * totals, right=True)
        # rounding could point past the last token with weight; it is the last step of the ladder
        last = torch.searchsorted(ladder, totals)
        found = torch.minimum(picked, last).tolist()
        return [each[:count] for each, count in zip(found, counts.tolist(), strict=True)]

    def _judged(
        self,
        logits: Tensor,
        rows: Sequence[int],
        tokens: list[list[int]],
        scored: dict[int, Tensor],
    ) -> dict[int, TokenLogprob]:
        tops = self._tops[list(rows)]
        if not (tops >= 0).any():
            return {}
        entries: list[int] = []
        at: list[int] = []
        chosen: list[int] = []
        entry = 0
        for place, each in enumerate(tokens):
            if tops[place] >= 0:
                entries += range(entry, entry + len(each))
                at += [place] * len(each)
                chosen += each
            entry += len(each)
        counts = [int(tops[place]) for place in at]
        if self._processed:
            order = {place: index for index, place in enumerate(scored)}
            logits, at = torch.stack(list(scored.values())), [order[place] for place in at]
        return dict(zip(entries, judge(logits, at, chosen, counts), strict=True))


def cut(weights: np.ndarray, most: int, share: float) -> None:
    """Zero in place what top-k and top-p leave out of one row of float64; the order is (weight descending, id ascending).

    Only the values are sorted: they give the least weight that stays, and how many of those that weigh just as much.
    """
    size = len(weights)
    best = np.partition(weights, size - most)[size - most :] if most < size else weights
    ordered = np.sort(best)
    ladder = np.cumsum(ordered[::-1])
    # the one that reaches the share is the last to stay; the mass ahead of each later one is the share or more
    kept = int(np.searchsorted(ladder, share * ladder[-1])) + 1
    least = ordered[-kept]
    spare = kept - (len(ordered) - int(np.searchsorted(ordered, least, side="right")))
    equal = np.flatnonzero(weights == least)
    weights *= weights >= least
    weights[equal[spare:]] = 0.0
