"""Which request sits in which row of the executor's tables, and what has to be told of it with the next plan.

Used by the batch alone. A row is told whole when it has a new owner (core/plan), with the first plan that computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from xllm_py.core.block_manager import BlockManager
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.request import Request


class Rows:
    """One engine's; `request.row` is kept by this alone."""

    def __init__(self, count: int, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._free = list(range(count - 1, -1, -1))
        self._count = count
        self._started: list[Request] = []  # in rows that have not been told yet

    @property
    def num_free(self) -> int:
        """Rows of nobody."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self._count - len(self._free)

    @property
    def spare(self) -> int:
        """A row of nobody, for one step; it stays free."""
        return self._free[-1]

    def assign(self, request: Request) -> None:
        """Give it a row; the caller has seen that there is one."""
        request.row = self._free.pop()
        self._started.append(request)

    def release(self, request: Request) -> None:
        """Take its row, when it has one."""
        if request.row >= 0:
            self._free.append(request.row)
            request.row = -1
            if request in self._started:
                self._started.remove(request)

    def tell_anew(self, requests: Iterable[Request]) -> None:
        """Nobody knows what the executor's tables hold."""
        self._started = [request for request in requests if request.row >= 0]

    def with_starts(self, plan: StepPlan) -> StepPlan:
        """The plan, with the new owners of its rows; what they grew by is in their block lists already. Raises as BlockManager.check.

        An empty plan is not executed, so rows are told with the next one that is not.
        """
        if not self._started or not plan.rows:
            return plan
        planned = set(plan.rows)
        new = [each for each in self._started if each.row in planned]
        for each in new:
            self._blocks.check(each.block_ids, each.tag, each.hashes)
        starts = tuple(map(_start, new))
        self._started = [each for each in self._started if each.row not in planned]
        fresh = {start.row for start in starts}
        grown = zip(plan.grown_rows, plan.grown_blocks, strict=True)
        kept = [(row, block) for row, block in grown if row not in fresh]
        return replace(
            plan,
            started=starts,
            grown_rows=[row for row, _ in kept],
            grown_blocks=[block for _, block in kept],
        )


def _start(request: Request) -> RowStart:
    sampling = request.submission.sampling
    history = request.tokens if sampling.has_history else []
    return RowStart(
        row=request.row,
        request_id=request.request_id,
        block_ids=tuple(request.block_ids),
        sampling=sampling,
        stop_ids=request.stop_ids,
        choice=request.choice,
        prompt_ids=tuple(history[: request.num_prompt]),
        generated_ids=tuple(history[request.num_prompt :]),
    )
