"""The common case: requests that decode, one token a step each. Kept in columns from one step to the next, so that a step of many
touches each of them once, to note its token. The only hot loops of the scheduler.

Used by the batch alone. What differs from the general case is nothing but the cost: what happens rarely (a block is full, an answer
ends) is found by one comparison and left to the general case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xllm_py.core.block_manager import BlockManager
from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.request import Request, State


class Decodes:
    """Those of one engine. `Request.lane` is the place of a request in every column, kept by this alone."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.requests: list[Request] = []
        self.full: dict[Request, None] = {}  # these need a block before they can be planned
        self._tokens: list[list[int]] = []
        self._newest: list[int] = []  # the token to compute next
        self._rows: list[int] = []
        self._computed: list[int] = []
        self._positions: list[int] = []  # of the token to draw next, 0 = first generated
        self._look_at: list[int] = []  # with so many computed, a block is full or the answer over
        self._stop_ids: list[frozenset[int]] = []
        self._ids: list[str] = []
        self._attempts: list[int] = []
        self._choices: list[int] = []
        self._alone = 0  # of them that no step is planned ahead of: see `_goes_ahead`
        self._columns: tuple[list[Any], ...] = (
            self.requests,
            self._tokens,
            self._newest,
            self._rows,
            self._computed,
            self._positions,
            self._look_at,
            self._stop_ids,
            self._ids,
            self._attempts,
            self._choices,
        )

    def __len__(self) -> int:
        return len(self.requests)

    @staticmethod
    def takes(request: Request) -> bool:
        """Whether nothing is due but its newest token, and nothing to be told but the next one."""
        return (
            request.state is State.RUNNING
            and request.lane < 0 <= request.row
            and request.num_due == 1
            and bool(request.first_ids)
            and not request.shares_tail
            and request.submission.sampling.logprobs < 0
        )

    def add(self, request: Request) -> None:
        """One that `takes` is true of."""
        request.lane = len(self.requests)
        submission = request.submission
        values = (
            request,
            request.tokens,
            request.tokens[-1],
            request.row,
            request.num_computed,
            request.num_generated,
            0,
            request.stop_ids,
            submission.request_id,
            submission.attempt,
            request.choice,
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._alone += not _goes_ahead(request)
        self.look_again(request)

    def drop(self, request: Request) -> None:
        """It decodes no more; the last one takes its place."""
        lane, request.lane = request.lane, -1
        last = self.requests[-1]
        for column in self._columns:
            column[lane] = column[-1]
            column.pop()
        if last is not request:
            last.lane = lane
        self._alone -= not _goes_ahead(request)
        self.full.pop(request, None)

    def clear(self) -> list[Request]:
        """Drop all of them, and say who they were."""
        requests = list(self.requests)
        for request in requests:
            request.lane = -1
        for column in self._columns:
            column.clear()
        self._alone = 0
        self.full.clear()
        return requests

    def look_again(self, request: Request) -> None:
        """Its blocks, or what is shared of them, changed."""
        room = self._room(request)
        if request.num_computed < room:
            self.full.pop(request, None)
        else:
            self.full[request] = None
        self._look_at[request.lane] = min(room, request.publish_at, request.max_len - 1)

    def plan(self, plan: StepPlan) -> None:
        """A row of one token and one draw for each; none is `full`."""
        ones = [1] * len(self.requests)
        plan.num_tokens.extend(ones)
        plan.sample.extend(ones)
        plan.rows.extend(self._rows)
        plan.num_computed.extend(self._computed)
        plan.token_ids.extend(self._newest)
        plan.positions.extend(self._positions)

    def plan_ahead(self, step: int, blocks: BlockManager) -> StepPlan | None:
        """The plan of once more all of them, while the one of now is computed; None where its result must be known first.

        That is where somebody's answer ends with it for sure, where choosing takes more than the highest logit, where one may have to give way
        at any moment, and where blocks lack.
        """
        due = [
            request
            for request, count, at in zip(self.requests, self._computed, self._look_at, strict=True)
            if count + 1 >= at
        ]
        if self._alone or any(each.num_computed + 2 >= each.max_len for each in due):
            return None
        full = [each for each in due if each.num_computed + 1 >= self._room(each)]
        if len(full) > blocks.num_free:
            return None
        plan = StepPlan(step=step, carried=True)
        for request in full:
            (fresh,) = blocks.allocate(1, tag=request.tag)
            request.block_ids.append(fresh)
            plan.grown_rows.append(request.row)
            plan.grown_blocks.append(fresh)
            self.look_again(request)
        self.plan(plan)
        plan.token_ids.clear()
        plan.num_computed[:] = [count + 1 for count in plan.num_computed]
        plan.positions[:] = [position + 1 for position in plan.positions]
        return plan

    def _room(self, request: Request) -> int:
        return len(request.block_ids) * self._block_size

    def apply(self, token_ids: Sequence[int], outputs: Outputs) -> list[tuple[int, Request]]:
        """Give each its token, and an entry of the outputs.

        token_ids: of the last plan, in its order; nobody came or went since. Returns the entries of those to look at: the answer
        ends, or a block is full.
        """
        entry = len(outputs.request_ids)
        outputs.request_ids.extend(self._ids)
        outputs.attempts.extend(self._attempts)
        outputs.choices.extend(self._choices)
        outputs.positions.extend(self._positions)
        outputs.token_ids.extend(token_ids)
        outputs.finish_reasons.extend([""] * len(self.requests))
        self._newest[:] = token_ids
        self._positions[:] = [position + 1 for position in self._positions]
        self._computed[:] = [count + 1 for count in self._computed]
        for request, tokens, token, count in zip(
            self.requests, self._tokens, token_ids, self._computed, strict=True
        ):
            tokens.append(token)
            request.num_computed = count
        seen = zip(self._computed, self._look_at, token_ids, self._stop_ids, strict=True)
        return [
            (entry + lane, self.requests[lane])
            for lane, (count, look_at, token, stop_ids) in enumerate(seen)
            if count >= look_at or token in stop_ids
        ]


def _goes_ahead(request: Request) -> bool:
    """Whether its next token may be computed before the one before it is known, except by the device."""
    return request.submission.sampling.takes_highest and not request.submission.offline
