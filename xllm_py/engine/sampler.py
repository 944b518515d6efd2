"""From logits to tokens. A pure function of (logits of one row, seed, choice, position), the same in any batch, on any instance.

Greedy takes the highest logit, ties to the lowest id. Otherwise one uniform number per token, from a counter-based generator,
picks from the cumulative distribution over the vocabulary (`Device.draw`).
Penalties, biases, bans and grammars change the logits before all that (`edits`). Called by the worker. A row's parameters stand in columns,
written when the row gets an owner; each step gathers the rows it needs, and a row pays only for what its request asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.plan import RowStart
from xllm_py.device import draws as host
from xllm_py.device.base import Drawing
from xllm_py.engine.edits import Edits, apply
from xllm_py.engine.judge import judge
from xllm_py.engine.uniforms import uniforms

PROCESSED = "processed"

Draw = Callable[[Tensor, Sequence[Drawing]], list[list[int]]]  # `Device.draw`


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was drawn for one step."""

    token_ids: list[int]  # flat, row after row
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # index in token_ids


def merged(tokens: list[list[int]], places: Sequence[int], chosen: Drawn) -> Drawn:
    """tokens: of each row; those of the rows at `places` are what was chosen for these rows alone."""
    starts = np.cumsum([0, *map(len, tokens)])
    logprobs, entry = {}, 0
    for place in places:
        for nth in range(len(tokens[place])):
            tokens[place][nth] = chosen.token_ids[entry]
            if entry in chosen.logprobs:
                logprobs[int(starts[place]) + nth] = chosen.logprobs[entry]
            entry += 1
    return Drawn(token_ids=[token for each in tokens for token in each], logprobs=logprobs)


@dataclass(frozen=True, slots=True)
class _Step:
    """What is to be drawn, and what was."""

    rows: Sequence[int]
    positions: Sequence[int]
    draws: Sequence[int]
    tokens: list[list[int]]
    # in processed mode: place in rows -> the logits its tokens are judged by
    scored: dict[int, Tensor] = field(default_factory=dict)


class Sampler:
    """The rows' parameters and what they have said.

    logprobs_mode: `raw` tells how likely the model found a token, before penalties, bias, temperature and cuts; `processed` how
    likely it was to be drawn.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        vocab_size: int,
        logprobs_mode: str = "raw",
        draw: Draw = host.draw,
    ) -> None:
        self._vocab_size = vocab_size
        self._draw = draw
        self._processed = logprobs_mode == PROCESSED
        self._seeds, self._choices, self._top_ks, self._tops = np.zeros(
            (4, max_seqs), dtype=np.int64
        )
        self._temperatures, self._top_ps, self._min_ps = np.zeros((3, max_seqs))
        self._edits: list[Edits | None] = [None] * max_seqs
        self._highest, self._draws = [False] * max_seqs, [False] * max_seqs

    def start(self, start: RowStart) -> None:
        """A row has a new owner; everything of the last one is written over."""
        row, sampling = start.row, start.sampling
        size = self._vocab_size
        self._seeds[row], self._choices[row] = sampling.seed, start.choice
        self._top_ks[row] = min(sampling.top_k, size) if sampling.top_k > 0 else size
        self._tops[row] = sampling.logprobs
        self._temperatures[row] = sampling.temperature
        self._top_ps[row], self._min_ps[row] = sampling.top_p, sampling.min_p
        edits = sampling.has_history or sampling.logit_bias or sampling.min_tokens
        self._edits[row] = Edits(start, size) if edits else None
        self._highest[row] = sampling.takes_highest
        self._draws[row] = not sampling.greedy and sampling.logprobs < 0 and not edits

    def choose(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        draws: Sequence[int],
        masks: Mapping[int, NDArray[np.bool_]] = MappingProxyType({}),
        best: Sequence[int] | None = None,
    ) -> Drawn:
        """draws[i] tokens for row rows[i], for its own choice and the ones after it, at positions[i].

        logits: [rows, vocabulary] float32, finite; they are not changed. masks: row -> [vocabulary] what its grammar allows, at
        least one token; every row with a grammar has one. best: the highest of each row of logits, where it is known. The first token of
        a row is noted as its own.
        """
        step = _Step(rows, positions, draws, [[] for _ in rows])
        edited, plain = self._split(rows, positions)
        self._choose(logits, plain, plain, step, best)
        if edited:
            changed = logits[torch.tensor(edited)]
            due = [edit for place in edited if (edit := self._edits[rows[place]]) is not None]
            apply(
                changed,
                due,
                [positions[place] for place in edited],
                [masks.get(rows[place]) for place in edited],
            )
            self._choose(changed, range(len(edited)), edited, step)
        for row, said in zip(rows, step.tokens, strict=True):
            edit = self._edits[row]
            if edit is not None:
                edit.note(said[0])
        flat = [token for each in step.tokens for token in each]
        return Drawn(token_ids=flat, logprobs=self._judged(logits, step))

    def is_highest(self, row: int) -> bool:
        """Whether the row's token is the one with the highest logit, and nothing else is asked of it."""
        return self._highest[row]

    def only_draws(self, row: int) -> bool:
        """Whether the row's tokens are drawn from its logits as they are, and nothing else is asked of it."""
        return self._draws[row]

    def draw(
        self,
        logits: Tensor,
        at: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        draws: Sequence[int],
    ) -> list[list[int]]:
        """As `choose`, for rows that only draw, whose logits are in the rows `at`, where the device has them."""
        step = _Step(rows, positions, draws, [])
        return self._draw(logits, self._wanted(step, [(at[i], i) for i in range(len(rows))]))

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
        at: Sequence[int],
        places: Sequence[int],
        step: _Step,
        best: Sequence[int] | None = None,
    ) -> None:
        """Fill in the tokens of some places of the step, whose logits are in the rows `at`, and by what they are judged."""
        values = logits.numpy()
        drawn = []
        for index, place in zip(at, places, strict=True):
            row = step.rows[place]
            if self._temperatures[row] > 0:
                drawn.append((index, place))
                continue
            highest = int(values[index].argmax()) if best is None else best[index]
            step.tokens[place] = [highest] * step.draws[place]
            if self._processed and self._tops[row] >= 0:
                step.scored[place] = logits[index]
        if not drawn:
            return
        wanted = self._wanted(step, drawn)
        tokens = self._draw(logits, wanted)
        for (_, place), each, said in zip(drawn, wanted, tokens, strict=True):
            step.tokens[place] = said
            if each.weights is not None:
                step.scored[place] = each.weights.log_()

    def _wanted(self, step: _Step, drawn: list[tuple[int, int]]) -> list[Drawing]:
        """drawn: (row of the logits, place in the step) of each that draws."""
        numbers = self._numbers([place for _, place in drawn], step)
        return [
            self._drawing(step.rows[place], index, own)
            for (index, place), own in zip(drawn, numbers, strict=True)
        ]

    def _drawing(self, row: int, index: int, numbers: NDArray[np.float64]) -> Drawing:
        judged = self._processed and self._tops[row] >= 0
        return Drawing(
            row=index,
            temperature=float(self._temperatures[row]),
            top_k=int(self._top_ks[row]),
            top_p=float(self._top_ps[row]),
            min_p=float(self._min_ps[row]),
            numbers=numbers,
            weights=torch.empty(self._vocab_size) if judged else None,
        )

    def _numbers(self, places: list[int], step: _Step) -> list[np.ndarray]:
        """The uniform numbers of each place, one a draw."""
        counts = np.array([step.draws[place] for place in places])
        owners = np.repeat([step.rows[place] for place in places], counts)
        positions = np.repeat([step.positions[place] for place in places], counts)
        ends = counts.cumsum()
        nth = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        found = uniforms(self._seeds[owners], self._choices[owners] + nth, positions)
        return np.split(found, ends[:-1])

    def _judged(self, logits: Tensor, step: _Step) -> dict[int, TokenLogprob]:
        tops = self._tops[list(step.rows)]
        if not (tops >= 0).any():
            return {}
        entries: list[int] = []
        at: list[int] = []
        chosen: list[int] = []
        entry = 0
        for place, each in enumerate(step.tokens):
            if tops[place] >= 0:
                entries += range(entry, entry + len(each))
                at += [place] * len(each)
                chosen += each
            entry += len(each)
        counts = [int(tops[place]) for place in at]
        if self._processed:
            order = {place: index for index, place in enumerate(step.scored)}
            logits, at = torch.stack(list(step.scored.values())), [order[place] for place in at]
        return dict(zip(entries, judge(logits, at, chosen, counts), strict=True))
