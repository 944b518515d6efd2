"""The batch: who waits, who runs in which row, and what the next step computes.

Order in a step: running requests first (decodes and unfinished prompts, oldest first), then waiting ones in the order of core/waiting, until tokens, rows or blocks
run out. With --enable_mix_batch=false prompts go first, in steps of their own. A waiting one begins behind the blocks that the prefix cache has of it; while another one
computes what comes next in it, it lets others pass. A request that needs a block when none is free preempts the youngest running one, whose blocks are freed and whose tokens
are computed again later; the youngest itself waits with what it has. With --enable_online_preempt_offline running requests stand in the order of core/waiting, so that offline
ones that have not waited long are the first to give way, also to an online one that waits for a row or for blocks. A request that is to be given away gets all its blocks
when it is admitted and is never preempted, because the transport may be reading them.

Used by the scheduler alone. Victims are younger than the request they give way to, and the decodes are written into a plan last (core/decodes), so what is in a plan stays.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable

from xllm_py.core.block_manager import BlockManager
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.decodes import Decodes
from xllm_py.core.headroom import Headroom
from xllm_py.core.journey import Moment
from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.prefix_cache import PrefixCache
from xllm_py.core.request import Request, State
from xllm_py.core.rows import Rows
from xllm_py.core.trial import Trial, proof
from xllm_py.core.under_way import Step, UnderWay
from xllm_py.core.waiting import Waiting


class Batch:
    """Owns the queues and the rows; the blocks belong to the block manager."""

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        prefix: PrefixCache,
        headroom: Headroom,
    ) -> None:
        self._config = config
        self._headroom = headroom
        self._blocks = blocks
        self._prefix = prefix
        self._rows = Rows(config.max_seqs_per_batch, blocks)
        self._decodes = Decodes(blocks.block_size)
        self._others: dict[Request, None] = {}  # those that run and are not among the decodes
        self._order = itertools.count()
        self._under_way = UnderWay(blocks)
        self._now = Step()  # the step that is being planned
        self._step = 0
        self.trial = Trial()
        self._offline_gives_way = config.online_preempts_offline and not config.zero_evict
        self.num_copied = 0  # blocks, since the start
        self.waiting = Waiting(config.priority_strategy)
        self._copied_from: list[int] = []  # held until they have been copied
        self.running: list[Request] = []  # in the order of core/waiting, or of admission
        self.admitted: list[Request] = []  # to be given away, since the scheduler last looked

    def run(self, request: Request) -> None:
        """A request that has its blocks already: landed, or kept after all."""
        by_moment = self._config.online_preempts_offline
        moment = self.waiting.moment(request) if by_moment else 0.0
        request.order = (moment, next(self._order))
        if by_moment:
            bisect.insort(self.running, request, key=_order)
        else:
            self.running.append(request)
        self._others[request] = None

    def settle(self, request: Request) -> None:
        """A running one has a new token; from now on it may decode with the others."""
        if request.lane >= 0:
            self._decodes.look_again(request)
        elif not self._under_way and self._decodes.takes(request):
            del self._others[request]
            self._decodes.add(request)

    def remove(self, request: Request) -> None:
        """It has ended or is being given: leave queue and row."""
        if self._under_way.has_decodes:
            self._dissolve()  # their places in the plan are not their places any more
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self.running.remove(request)
            self._prefix.leave(request)
            if request in self._others:
                del self._others[request]
            else:
                self._decodes.drop(request)
        self._rows.release(request)

    def take_planned(self, *, in_columns: bool) -> tuple[list[Request], range]:
        """The requests of the last plan, in its order, and which of them are the decodes as they are now.

        in_columns: the decodes may be taken in together; otherwise they are taken apart, and none are told.
        """
        if not in_columns:
            self._dissolve()
        self._blocks.free(self._copied_from)
        self._copied_from = []
        step = self._under_way.take()
        return step.planned, step.decoding

    def take_tokens(self, token_ids: list[int], outputs: Outputs) -> list[tuple[int, Request]]:
        """The decodes got these; see Decodes.apply. Whoever is returned and runs on is to be settled."""
        return self._decodes.apply(token_ids, outputs)

    def _dissolve(self) -> None:
        """Every decode is a request like the others again, until it has its next token."""
        self._others |= dict.fromkeys(self._decodes.clear())
        self._under_way.dissolve()

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return self._rows.num_used

    def plan(self, now: float) -> StepPlan:
        """Choose what the next step computes; may be empty."""
        self._step += 1
        plan = StepPlan(step=self._step)
        self._now = self._under_way.begin()
        if self.trial.pending:
            return self._plan_trial(plan)
        if self._offline_gives_way:
            self._make_way_here()
        if self._config.mix_batch:
            num_waiting = len(self.waiting)
            budget = self._plan_running(plan, self._config.max_tokens_per_batch)
            if len(self.waiting) == num_waiting:  # nobody was preempted: there is room for more
                self._admit(plan, budget, now)
        elif not self._plan_prompts(plan, now):
            self._plan_running(plan, self._config.max_tokens_per_batch)
        # an empty plan is not executed, so rows are told with the next one that is not
        return self._rows.with_starts(plan)

    def plan_ahead(self) -> StepPlan | None:
        """The step after the one that is computed now, when nothing but its tokens could change it; else None."""
        comes_in = self.waiting and (self._rows.num_free or self._offline_gives_way)
        if not self._under_way.repeats or self._others or comes_in or self.trial.pending:
            return None
        plan = self._decodes.plan_ahead(self._step + 1, self._blocks)
        if plan is not None:
            self._step += 1
            self._under_way.repeat()
        return plan

    # ---- after a step that raised ----

    def rewind(self, plan: StepPlan) -> list[Request]:
        """The step was not computed, or only in part: all rows are told anew. Returns its requests that still run.

        One whose block was to be copied in it is computed anew: nobody knows whether the copy was made.
        """
        planned, _ = self.take_planned(in_columns=False)
        self._under_way.drop()
        suspects = [request for request in planned if request.state is State.RUNNING]
        copied = set(plan.copied_to)
        for request in suspects:
            if copied and not copied.isdisjoint(request.block_ids):
                self._preempt(request)
        self._rows.tell_anew(self.running)
        return suspects

    def _plan_trial(self, plan: StepPlan) -> StepPlan:
        """One suspect alone, or the proof; nobody else, and nobody new."""
        request = self.trial.next()
        if request is not None:
            self._plan_slowly(request, self._config.max_tokens_per_batch, plan)
        elif self.trial.take_proof() and self._rows.num_free and self._blocks.num_free:
            block = self._blocks.allocate(1)  # nobody is given it before the step is over
            self._blocks.free(block)
            return proof(self._step, self._rows.spare, block[0])
        return self._rows.with_starts(plan)

    # ---- parts of a plan ----

    def _plan_prompts(self, plan: StepPlan, now: float) -> bool:
        """A step without those that decode: prompts that have begun, then waiting ones. False: there is none to compute."""
        budget = self._config.max_tokens_per_batch
        for request in sorted(self._others, key=_order):
            if budget > 0 and request.num_due > 1 and request.state is State.RUNNING:
                budget -= self._plan_slowly(request, budget, plan)
        self._admit(plan, budget, now)
        return bool(plan.rows)

    def _plan_running(self, plan: StepPlan, budget: int) -> int:
        """One pass over the running requests, as many as the budget has tokens for; returns what is left of it."""
        if budget < len(self.running):
            self._dissolve()
            needy = self.running[:budget]
        else:
            needy = sorted([*self._others, *self._decodes.full], key=_order)
        budget -= len(self._decodes)
        for request in needy:
            if request.state is not State.RUNNING:
                continue  # an older one preempted it
            if request in self._others:
                budget -= self._plan_slowly(request, budget, plan) if budget > 0 else 0
            elif self._grow(request, 1, plan):
                self._decodes.look_again(request)
            else:
                self._decodes.drop(request)
                self._others[request] = None
        self._decodes.plan(plan)
        self._now.add_decodes(self._decodes.requests)
        return budget

    def _plan_slowly(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Rows, blocks and chunks; returns the tokens planned."""
        if request.row < 0 and self._rows.num_free:
            self._rows.assign(request)
        count = self._tokens_now(request, budget) if request.row >= 0 else 0
        if not count:
            return 0
        if request.shares_tail and not self._copy_tail(request, plan):
            self._rows.release(request)  # with a row it would count as ready to write
            return 0
        if not self._grow(request, count, plan):
            return 0
        self._now.add(request, count, plan)
        return count

    def _tokens_now(self, request: Request, budget: int) -> int:
        """How many tokens of a request this step computes."""
        due = request.num_due
        if not self._config.enable_chunked_prefill:
            # a whole prompt in one step; one that grew longer than a step (by preemption) goes alone
            alone = budget == self._config.max_tokens_per_batch
            return due if due <= budget or alone else 0
        return min(due, budget, self._config.max_tokens_per_chunk)

    def _grow(self, request: Request, count: int, plan: StepPlan) -> bool:
        """Get the blocks for `count` more tokens, preempting the youngest. False: the request must wait."""
        have = len(request.block_ids)
        missing = self._blocks.blocks_for(request.num_computed + count) - have
        if missing <= 0:
            return True
        if not self._make_room(request, missing):
            return False
        fresh = self._blocks.allocate(missing, tag=request.tag)
        request.block_ids += fresh
        plan.grown_rows.extend([request.row] * missing)
        plan.grown_blocks.extend(fresh)
        return True

    def _make_room(self, request: Request, missing: int) -> bool:
        while missing > self._blocks.num_free:
            victim = self._victim(request)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _copy_tail(self, request: Request, plan: StepPlan) -> bool:
        """Copy on write: a choice that began in another's half full block gets its own. False: it must wait for room.

        What it computes now goes into that block, so that it is planned in this very step and the copy is carried out.
        """
        tail = request.block_ids[-1]
        if not self._blocks.is_sole(tail):
            if not self._make_room(request, 1):
                return False
            (fresh,) = self._blocks.allocate(1, tag=request.tag)
            plan.copied_from.append(tail)
            plan.copied_to.append(fresh)
            request.block_ids[-1] = fresh
            self._copied_from.append(tail)
            self.num_copied += 1
        request.shares_tail = False
        return True

    def _victim(self, needy: Request) -> Request | None:
        """The youngest that runs and is younger than the needy one; without any, that one waits with what it has."""
        for request in reversed(self.running):
            if request is needy:
                return None
            if not request.to_give:
                return request
        return None

    def _preempt(self, request: Request) -> None:
        self.remove(request)
        self._blocks.free(request.block_ids)
        request.block_ids = []
        request.num_computed = 0
        request.shares_tail = False
        request.prompt_logprobs = []
        request.num_preemptions += 1
        request.move(State.WAITING)
        self.waiting.put_back(request)

    def _admit(self, plan: StepPlan, budget: int, now: float) -> None:
        index = 0
        while index < len(self.waiting) and self._rows.num_free and budget > 0:
            request = self.waiting[index]
            # matched before the budget is spent: what is there already costs none
            found = self._prefix.find(request, request.num_reusable)
            if self._prefix.worth_waiting(request, len(found), request.num_reusable):
                index += 1
                continue
            request.num_computed = len(found) * self._blocks.block_size
            count = self._tokens_now(request, budget)
            need = self._blocks.blocks_for(len(request.tokens)) - len(found)
            if not (
                count
                and self._headroom.has_room(need + self._blocks.num_idle(found))
                and self._headroom.admits(request)
            ):
                request.num_computed = 0
                return
            self.waiting.remove(request)
            self._hold(request, found, need)
            request.move(State.RUNNING)
            request.stamp(Moment.ADMITTED, now)
            self._rows.assign(request)
            self.run(request)
            if request.to_give:
                self.admitted.append(request)
            self._now.add(request, count, plan)
            budget -= count

    # ---- offline ones give way ----

    def _giving_way(self, newcomer: Request) -> list[Request]:
        """Running offline requests that come after it, the one to give way first in front; none to an offline one."""
        if newcomer.submission.offline or not self._offline_gives_way:
            return []
        place = self.waiting.moment(newcomer)
        return [
            each
            for each in reversed(self.running)
            if each.submission.offline and not each.to_give and self.waiting.moment(each) > place
        ]

    def make_way(self, newcomer: Request, need: Callable[[], int], *, row: bool) -> None:
        """Preempt offline requests until so many blocks, and a row, are there; nobody, when all of them are not enough."""
        victims = self._giving_way(newcomer)
        gain = sum(len(each.block_ids) for each in victims)
        if not victims or not self._headroom.has_room(need(), gain):
            return
        for victim in victims:
            if (self._rows.num_free or not row) and self._headroom.has_room(need()):
                return
            self._preempt(victim)

    def _make_way_here(self) -> None:
        """For one that has landed and finds no row, and for the first that waits."""
        landed = (each for each in self._others if each.row < 0 and not each.submission.offline)
        newcomer = None if self._rows.num_free else next(landed, None)
        if newcomer is not None:
            for victim in self._giving_way(newcomer)[:1]:
                self._preempt(victim)
        elif self.waiting:
            first = self.waiting[0]
            self.make_way(first, lambda: self._lacking(first), row=True)

    def _lacking(self, request: Request) -> int:
        """Blocks that its admission would take from those that can be allocated."""
        found = self._prefix.find(request, request.num_reusable)
        need = self._blocks.blocks_for(len(request.tokens)) - len(found)
        return need + self._blocks.num_idle(found)

    def crowded(self, newcomer: Request, promised: int) -> tuple[str, str]:
        """Why it is not taken now, for want of rows, as reason and text; both empty when there are enough."""
        taken = len(self.running) + len(self.waiting) + promised
        best_of = newcomer.submission.sampling.best_of
        wanted = best_of - 1 if taken else 0  # alone, its choices may wait for each other
        gain = 0
        if taken + wanted >= self._config.max_seqs_per_batch:
            gain = len(self._giving_way(newcomer))
        if taken + wanted - gain >= self._config.max_seqs_per_batch:
            return "full_now", f"{taken} requests run or are promised already"
        return "", ""

    def _hold(self, request: Request, found: list[int], need: int) -> None:
        self._blocks.acquire(found)
        request.block_ids = found + self._blocks.allocate(need, tag=request.tag)
        self._prefix.begin(request, len(found))
        if not request.num_preemptions:
            request.num_cached = min(request.num_computed, request.num_prompt)
            self._prefix.note(len(request.tokens), request.num_computed)

    def assert_empty(self) -> None:
        """Nobody waits, runs or sits in a row."""
        assert not self.running
        assert not self._others
        assert not len(self._decodes)
        assert not self.waiting
        assert not self.num_rows


def _order(request: Request) -> tuple[float, int]:
    return request.order
