"""What a request changes in its logits before a token is chosen: penalties, bias, and the ban on early ends.

Made by the sampler from a RowStart and replaced whole by the row's next one, so that nothing is ever cleared. Only the entries that change
are read and written: a row costs what it said, not the vocabulary. In this order: repetition penalty over prompt and answer (Keskar et
al. 2019), frequency and presence penalty over the answer (as the OpenAI API defines them), bias, ban.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xllm_py.core.plan import RowStart


class Edits:
    """Of one row. Ids beyond the vocabulary are no tokens and change nothing."""

    def __init__(self, start: RowStart, vocab_size: int) -> None:
        sampling = start.sampling
        self.repetition = sampling.repetition_penalty
        self.frequency = sampling.frequency_penalty
        self.presence = sampling.presence_penalty
        self.penalised = sampling.penalised
        self.min_tokens = sampling.min_tokens
        self.guided = bool(sampling.grammar)
        self.stop_ids = np.array(
            sorted(token for token in start.stop_ids if token < vocab_size), dtype=np.int64
        )
        biases: dict[int, float] = {}
        for token, bias in sampling.logit_bias:
            if token < vocab_size:
                biases[token] = biases.get(token, 0.0) + bias
        self.bias_ids = np.array(list(biases), dtype=np.int64)
        self.biases = np.array(list(biases.values()), dtype=np.float32)
        self._slots: dict[int, int] = {}  # token -> its place in the two arrays below
        if self.penalised:
            known = len(start.prompt_ids) + sampling.max_tokens
            self._ids = np.zeros(min(vocab_size, known), dtype=np.int64)
            self._counts = np.zeros(len(self._ids), dtype=np.float32)
            for token in start.prompt_ids:
                self._slot(token)
            for token in start.generated_ids:
                self.note(token)

    def due(self, position: int) -> bool:
        """Whether anything changes for the token at this position."""
        return self.penalised or self.guided or bool(len(self.bias_ids)) or self.bans(position)

    def bans(self, position: int) -> bool:
        """Whether the tokens that end the answer cannot come yet."""
        return position < self.min_tokens and bool(len(self.stop_ids))

    def note(self, token: int) -> None:
        """The row's answer grew by a token."""
        if self.penalised:
            self._counts[self._slot(token)] += 1

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of prompt and answer, each once, and how often each was generated."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def _slot(self, token: int) -> int:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            self._ids[slot] = token
        return slot


def apply(
    logits: Tensor,
    edits: Sequence[Edits],
    positions: Sequence[int],
    masks: Sequence[NDArray[np.bool_] | None],
) -> None:
    """Change the rows in place. logits: [rows, vocabulary] float32, one row per entry of the lists.

    masks: [vocabulary] what a row's grammar allows, at least one token.
    """
    values = logits.numpy()
    penalised = [(row, each) for row, each in enumerate(edits) if each.penalised]
    if penalised:
        _penalise(values, penalised)
    biased = [(row, each) for row, each in enumerate(edits) if len(each.bias_ids)]
    if biased:
        where = _places([(row, each.bias_ids) for row, each in biased])
        values[where] += np.concatenate([each.biases for _, each in biased])
    # tokens that cannot come, whatever was added to them
    banned = [(row, each) for row, each in enumerate(edits) if each.bans(positions[row])]
    bans = {row: each.stop_ids for row, each in banned}
    for row, mask in enumerate(masks):
        if mask is not None:
            values[row][~_allowed(mask, bans.pop(row, None))] = -torch.inf
    if bans:
        values[_places(list(bans.items()))] = -torch.inf


def _allowed(mask: NDArray[np.bool_], banned: NDArray[np.int64] | None) -> NDArray[np.bool_]:
    """What a grammar allows, less the ends that come too early; an answer that is complete and cannot grow may end."""
    if banned is None:
        return mask
    longer = mask.copy()
    longer[banned] = False
    return longer if longer.any() else mask


def _penalise(values: np.ndarray, penalised: list[tuple[int, Edits]]) -> None:
    seen = [each.seen() for _, each in penalised]
    sizes = [len(ids) for ids, _ in seen]

    def spread(name: str) -> np.ndarray:
        each = np.array([getattr(edit, name) for _, edit in penalised], dtype=np.float32)
        return np.repeat(each, sizes)

    where = _places([(row, ids) for (row, _), (ids, _) in zip(penalised, seen, strict=True)])
    found, counts = values[where], np.concatenate([count for _, count in seen])
    repetition = spread("repetition")
    found = np.where(found > 0, found / repetition, found * repetition)
    found -= spread("frequency") * counts
    found -= spread("presence") * (counts > 0)
    values[where] = found


def _places(ids: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the named entries: row numbers beside ids."""
    rows = np.repeat([row for row, _ in ids], [len(each) for _, each in ids])
    return rows, np.concatenate([each for _, each in ids])
