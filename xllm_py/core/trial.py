"""After a step whose computation raised: who is tried alone, and whether the executor can still be trusted.

    a step of many raised -> each of its requests is a suspect and gets steps of its own, one request a step
    a step of one raised  -> that request fails; when no step has succeeded since, the executor has to prove itself
    the proof raised      -> the executor is broken

The proof is one token in a row and a block that nobody uses. Used by the scheduler and the batch alone. A suspect computes from
where it stood before the step: what a step writes is taken in only after it, and writing the same tokens again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.request import Request, State
from xllm_py.core.sampling import SamplingParams


class Trial:
    """Idle most of the time. `num_crashes`: steps that raised, since the start."""

    def __init__(self) -> None:
        self._suspects: list[Request] = []
        self._proof_due = False
        self.num_crashes = 0

    @property
    def pending(self) -> bool:
        """Whether the next steps belong to suspects or to the proof."""
        return bool(self._suspects) or self._proof_due

    def suspect(self, requests: Iterable[Request]) -> None:
        """Whoever of these raises again alone is the one."""
        self._suspects = [*requests, *self._suspects]

    def next(self) -> Request | None:
        """The next one to compute alone; those that ended or lost their blocks meanwhile are let go."""
        while self._suspects:
            request = self._suspects.pop(0)
            if request.state is State.RUNNING:
                return request
        return None

    def found(self) -> None:
        """One raised alone: it, or the executor."""
        self._proof_due = True

    def take_proof(self) -> bool:
        """Whether the proof is to be made now; it is made once."""
        due, self._proof_due = self._proof_due, False
        return due

    def passed(self) -> None:
        """A step succeeded: the executor works."""
        self._proof_due = False


def proof(step: int, row: int, block: int) -> StepPlan:
    """A token of nobody, in a row and a block that are nobody's."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    return StepPlan(
        step=step,
        started=(RowStart(row=row, request_id="", block_ids=(block,), sampling=sampling),),
        rows=[row],
        num_tokens=[1],
        num_computed=[0],
        token_ids=[0],
        sample=[1],
        positions=[0],
    )
