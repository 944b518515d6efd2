"""What goes down to the executor and comes back up: StepPlan, StepResult, Outputs. Columnar, plain types only.

A batch row is a place in the executor's tables. Its state is built whole when it is assigned (`RowStart`) and dropped
when the row is started again; nothing is ever cleared by hand (TRUST S22). After that a plan names only what changed:
blocks appended and the tokens to compute.

    row          0        3        7          rows of this step, any order
    num_tokens   1        1        512        tokens to compute for it now
    num_computed 130      77       1024       tokens of it already in the cache
    sample       1        4        0          tokens to draw: 0 for an unfinished prompt chunk, best_of for a first token
    token_ids    [t]      [t]      [512 ids]  flat, in row order
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.sampling import SamplingParams

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"  # asked for from outside; nobody waits for it any more


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """A row gets a new owner; complete, so that nothing of the last owner can be seen.

    prompt_ids and generated_ids are told only when choosing a token depends on them (`SamplingParams.has_history`).
    """

    row: int
    request_id: str
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # any of these ends the answer
    choice: int = 0
    prompt_ids: tuple[int, ...] = ()
    generated_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward pass. The draws of row i are for choices `choice`, `choice` + 1, ... of its request."""

    step: int
    copied_from: list[int] = field(default_factory=list)  # blocks to copy before anything else,
    copied_to: list[int] = field(default_factory=list)  # each onto the one of the same index
    started: tuple[RowStart, ...] = ()  # applied before rows are read
    grown_rows: list[int] = field(default_factory=list)  # row i gets block grown_blocks[i] appended
    grown_blocks: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    positions: list[int] = field(
        default_factory=list
    )  # of the token to sample, 0 = first generated
    # index in `rows` -> prompt tokens whose logprobs are due: target j is judged by the output at token j
    targets: dict[int, list[int]] = field(default_factory=dict)
    # planned before the result of the step before it was there: same rows, each computes the token it drew there; token_ids is empty
    carried: bool = False

    @property
    def empty(self) -> bool:
        """Nothing to compute."""
        return not self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the executor found: `sample[i]` tokens per row of the plan, in the plan's order."""

    token_ids: list[int]
    failed_rows: dict[int, str] = field(default_factory=dict)  # row -> cause; its tokens are -1
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # index in token_ids
    # index in the plan's rows -> one per target
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What one step (or one abort) means for requests, in columns; the same shape on every wire.

    token_ids[i] is -1 when an entry only ends the request. finish_reasons[i] is "" while it goes on, else "stop",
    "length", "abort" or an error code of base.errors, whose text is then in messages[i].
    """

    step: int = 0
    request_ids: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    messages: dict[int, str] = field(default_factory=dict)  # entry -> text, errors only
    cached_tokens: dict[int, int] = field(
        default_factory=dict
    )  # entry -> prompt tokens not computed
    journeys: dict[int, dict[str, float]] = field(
        default_factory=dict
    )  # entry -> moment -> seconds
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # entry -> of its token
    # entry -> of the prompt's tokens from the second on; with the first entry of choice 0
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    def add(
        self,
        request_id: str,
        attempt: int,
        *,
        choice: int = 0,
        position: int,
        token_id: int = -1,
        finish_reason: str = "",
        message: str = "",
    ) -> int:
        """Append one entry and return its index, for the sparse columns."""
        self.request_ids.append(request_id)
        self.attempts.append(attempt)
        self.choices.append(choice)
        self.positions.append(position)
        self.token_ids.append(token_id)
        self.finish_reasons.append(finish_reason)
        if message:
            self.messages[len(self.request_ids) - 1] = message
        return len(self.request_ids) - 1

    def describe(self, journey: dict[str, float], cached_tokens: int) -> None:
        """What goes with the entry just added."""
        index = len(self.request_ids) - 1
        self.journeys[index], self.cached_tokens[index] = journey, cached_tokens
