"""Which tokens a row's grammar allows next: one matcher a row, masks computed in a thread while the model computes.

Used by engine/worker: `start` when a row gets an owner, `begin` before the forward pass, `take` after it, `told` with what was
drawn. A matcher is built by replaying what its row has said, so a row may begin anywhere: after a handoff or a preemption. Whatever
a grammar, the tokenizer or the library cannot do fails that row alone. Grammars come from openai/structured, which has checked them.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import llguidance
import numpy as np
from numpy.typing import NDArray

from xllm_py.base.grammar_limits import GRAMMAR_LIMITS
from xllm_py.core.plan import RowStart

_MAX_COMPILED = 32  # grammars kept for rows that follow
_MASK_TIMEOUT_S = 20.0  # the library's own limits end a step's work long before


class _Failed(Exception):
    """Why a row cannot go on, in one line."""


@dataclass(slots=True)
class _Row:
    start: RowStart
    matcher: llguidance.LLMatcher | None = None
    said: list[int] = field(default_factory=list)  # drawn, not yet told the matcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """Of one step: row -> [vocabulary] bool, what is allowed; row -> why it cannot go on."""

    allowed: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Matchers:
    """Those of all rows that have a grammar. Only the thread touches a matcher."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """folder: where tokenizer.json is. Read at once, in the thread: no step waits for it."""
        self._path = folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_ids = self._within(eos_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._rows: dict[int, _Row] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._work: Future[Masks] | None = None
        self._due: list[int] = []
        self._thread.submit(self._warm_up)

    def start(self, start: RowStart) -> None:
        """A row has a new owner."""
        self._rows.pop(start.row, None)
        if start.sampling.grammar:
            self._rows[start.row] = _Row(start)

    def begin(self, rows: Sequence[int]) -> None:
        """Start on the masks of those of these rows that have a grammar."""
        self._due = [row for row in rows if row in self._rows]
        if self._due:
            work = {row: self._rows[row] for row in self._due}
            self._work = self._thread.submit(self._masks, work)

    def take(self) -> Masks:
        """What `begin` started on."""
        work, self._work = self._work, None
        if work is None:
            return Masks()
        try:
            return work.result(_MASK_TIMEOUT_S)
        except TimeoutError:
            return Masks(failed=dict.fromkeys(self._due, "its grammar took too long; simplify it"))

    def told(self, row: int, token: int) -> None:
        """The row said this token; looked at in its next step."""
        if row in self._rows:
            self._rows[row].said.append(token)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- in the thread ----

    def _warm_up(self) -> None:
        with contextlib.suppress(_Failed):  # each row that has a grammar is told so
            self._open_tokenizer()

    def _masks(self, rows: dict[int, _Row]) -> Masks:
        masks = Masks()
        for number, row in rows.items():
            try:
                masks.allowed[number] = self._mask(row)
            except _Failed as failed:
                masks.failed[number] = str(failed)
        return masks

    def _mask(self, row: _Row) -> NDArray[np.bool_]:
        if row.matcher is None:
            row.matcher = self._matcher(row.start.sampling.grammar)
            row.said[:0] = row.start.generated_ids
        matcher = row.matcher
        said, row.said = row.said, []
        matcher.consume_tokens(said)
        bits = matcher.compute_bitmask()
        complete = matcher.is_accepting()
        if matcher.is_error():
            raise _Failed(f"its grammar cannot be followed: {_line(matcher.get_error())}")
        found = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(np.bool_)
        allowed = np.zeros(self._vocab_size, np.bool_)  # nothing beyond the tokenizer's vocabulary
        size = min(self._vocab_size, len(found))
        allowed[:size] = found[:size]
        # the row's own ends take the place of the library's
        allowed[self._within(self._open_tokenizer().eos_tokens)] = False
        if complete:
            allowed[self._within(row.start.stop_ids)] = True
        if not allowed.any():
            raise _Failed("its grammar allows no further token, and nothing ends the answer")
        return allowed

    def _within(self, ids: Iterable[int]) -> list[int]:
        return [each for each in ids if each < self._vocab_size]

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        """At its beginning."""
        known = self._compiled.get(grammar)
        if known is None:
            tokenizer = self._open_tokenizer()
            limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
            known = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
            if known.is_error():
                raise _Failed(f"its grammar cannot be compiled: {_line(known.get_error())}")
            self._compiled[grammar] = known
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return known.deep_copy()

    def _open_tokenizer(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            if not self._path.is_file():
                raise _Failed("a grammar needs the model's tokenizer.json, which is missing")
            try:
                self._tokenizer = llguidance.LLTokenizer(
                    str(self._path), eos_token=self._eos_ids or None
                )
            except (ValueError, OSError) as error:
                raise _Failed(f"the model's tokenizer.json: {_line(str(error))}") from error
        return self._tokenizer


def _line(words: str) -> str:
    return " ".join(words.split())[:200]
