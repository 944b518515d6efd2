"""Steps that are planned and whose results are not taken in: one, or two where the second was planned before the first one's result was there.

While there are two, a request may end in the first that is computed in the second all the same. What that writes goes to a block that the request
no longer needs, so blocks are given back only when no step is under way any more. Used by the batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_py.core.block_manager import BlockManager
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import Request


@dataclass(slots=True)
class Step:
    """One of them."""

    planned: list[Request] = field(default_factory=list)  # in the plan's order
    decoding: range = range(0)  # which of them are the decodes as they are now

    def add(self, request: Request, count: int, plan: StepPlan) -> None:
        """A row of the plan: the next `count` tokens of a request."""
        start = request.num_computed
        end = start + count
        plan.rows.append(request.row)
        plan.num_tokens.append(count)
        plan.num_computed.append(start)
        plan.token_ids.extend(request.tokens[start:end])
        plan.sample.append(request.num_draws if end == len(request.tokens) else 0)
        if request.to_score:
            plan.targets[len(plan.rows) - 1] = request.tokens[start + 1 : end + 1]
        plan.positions.append(len(request.tokens) - request.num_prompt)
        self.planned.append(request)

    def add_decodes(self, requests: Sequence[Request]) -> None:
        """All that decode; their rows are in the plan."""
        self.decoding = range(len(self.planned), len(self.planned) + len(requests))
        self.planned += requests


class UnderWay:
    """Of one engine, oldest first."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._steps: list[Step] = []

    def __len__(self) -> int:
        return len(self._steps)

    def begin(self) -> Step:
        """A step that is planned with nothing under way; one that was left empty was never computed."""
        step = Step()
        self._steps = [step]
        return step

    @property
    def has_decodes(self) -> bool:
        """Whether a result is due to the decodes as they are now."""
        return any(step.decoding for step in self._steps)

    @property
    def repeats(self) -> bool:
        """Whether one step is under way, of decodes alone, so that the next may be the same once more."""
        if len(self._steps) != 1:
            return False
        step = self._steps[0]
        return 0 < len(step.decoding) == len(step.planned)

    def repeat(self) -> None:
        """The same requests once more, before the first result is there."""
        step = self._steps[0]
        self._steps.append(Step(list(step.planned), step.decoding))
        self._blocks.detain()

    def take(self) -> Step:
        """The oldest: its result is there."""
        step = self._steps.pop(0) if self._steps else Step()
        if not self._steps:
            self._blocks.let_go()
        return step

    def drop(self) -> None:
        """None will have a result."""
        self._steps.clear()
        self._blocks.let_go()

    def dissolve(self) -> None:
        """Places among the decodes are not their places any more."""
        for step in self._steps:
            step.decoding = range(0)
