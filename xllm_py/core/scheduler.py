"""The scheduler: schedule() gives a plan, apply() takes its result; nothing in between is its business.

There are no phases: each request has tokens known and tokens computed, and a step lets the computed catch up with the known.
A prefill instance is one whose submissions name a receiver, a decode instance one whose requests arrive by `reserve`.

It owns the requests and their states. What may come in is decided by core/admission, who runs by core/batch, how choices
begin to decode and end by core/lifecycle, what has been promised to givers by core/reservations, who holds which block by
core/block_manager. Pure: `now` is a parameter. Called by engine/loop and engine/handoff_agent, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm_py.base.errors import ContextLengthExceeded, Draining, QueueFull, RequestError
from xllm_py.core.admission import Admission, Tombstones
from xllm_py.core.batch import Batch
from xllm_py.core.block_manager import BlockManager, Holding
from xllm_py.core.config import ModelFacts, SchedulerConfig
from xllm_py.core.headroom import Headroom
from xllm_py.core.journey import Moment
from xllm_py.core.lifecycle import Lifecycle
from xllm_py.core.open_requests import NEVER, OpenRequests
from xllm_py.core.outbox import Outbox
from xllm_py.core.plan import FINISH_ABORT, Outputs, StepPlan, StepResult
from xllm_py.core.prefix_cache import PrefixCache
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Request, State, Submission
from xllm_py.core.reservations import Reservations, refusal


class Scheduler:
    """All requests of one engine."""

    def __init__(
        self,
        config: SchedulerConfig,
        facts: ModelFacts,
        num_blocks: int,
        block_size: int,
        prefix_root: bytes = b"",
        poison: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """prefix_root: the parent of all block hashes; empty: no prefix cache. poison: fills blocks with nonsense before they are
        used; then all blocks are checked before each step too.
        """
        self._config = config
        self._admission = Admission(config, facts, num_blocks, block_size)
        self._blocks = BlockManager(num_blocks, block_size, poison)
        self._checks_all = poison is not None
        self._prefix = PrefixCache(self._blocks, prefix_root)
        self._open = OpenRequests()
        self._headroom = Headroom(config, self._blocks, self._open)
        self._batch = Batch(config, self._blocks, self._prefix, self._headroom)
        self._reservations = Reservations(config.grant_ttl_s, self._blocks, self._prefix)
        self._tombstones = Tombstones()
        self._outbox = Outbox()
        self._life = Lifecycle(
            blocks=self._blocks,
            batch=self._batch,
            reservations=self._reservations,
            tombstones=self._tombstones,
            open_requests=self._open,
            outbox=self._outbox,
        )
        self.draining = False

    # ---- requests come in ----

    def add(self, submission: Submission, now: float) -> None:
        """Queue a request. Raises the RequestError leaf that says why not; a repeat is ignored."""
        known = self._open.get(submission.request_id)
        if known is not None and known.submission.attempt >= submission.attempt:
            return
        if self.draining:
            raise Draining("this instance is draining; send the request to another one")
        if len(self._batch.waiting) >= self._config.max_queue:
            raise QueueFull(f"{self._config.max_queue} requests wait already", retry_after_s=1.0)
        self._admission.check(submission, decode_here=submission.receiver is None)
        if self._tombstones.has(submission.request_id, submission.attempt, now):
            self._outbox.put_end(submission, FINISH_ABORT)
            return
        if known is not None:
            self._life.finish(known, FINISH_ABORT, now)
        request = self._open.add(self._admission.make(submission, State.WAITING, now))
        self._batch.waiting.add(request)

    def refuse(self, submission: Submission, error: RequestError) -> None:
        """Put the refusal of `add` on the road a token takes."""
        self._outbox.put_end(submission, error.code, error.message)

    # ---- D: reservations ----

    def reserve(self, offer: Offer, grant: bytes, now: float) -> OfferAnswer:
        """Reserve the blocks of an offered prompt, or refuse with a reason of SPEC 6.4.

        `grant` are 16 random bytes, used only when this is a new reservation: a repeated offer gets the first answer again,
        with a new expiry.
        """
        submission = offer.submission
        known = self._open.get(submission.request_id)
        if known is not None and known.submission.attempt >= submission.attempt:
            return self._reservations.repeat(known, submission.attempt, now)
        reason, text = self._refusal(submission, now)
        if reason:
            return refusal(submission.request_id, submission.attempt, reason, text)
        if known is not None:
            self._life.finish(known, FINISH_ABORT, now)
        request = self._open.add(self._admission.make(submission, State.RESERVED, now))
        return self._reservations.open(request, grant, now)

    def _refusal(self, submission: Submission, now: float) -> tuple[str, str]:
        """Reason and text, both empty when it can be taken."""
        if self.draining:
            return "draining", "this instance is draining"
        if self._tombstones.has(submission.request_id, submission.attempt, now):
            return "cancelled", "the request was cancelled before it was offered"
        if self._reservations.has_run(submission.request_id, submission.attempt):
            return "cancelled", "the request was taken before and has ended"
        reason, text = self._admission.refusal(submission, shares_prompts=self._prefix.enabled)
        if reason:
            return reason, text
        newcomer = self._admission.make(submission, State.RESERVED, now)
        if not self._headroom.admits(newcomer):
            return "full_now", "the answers that have begun may need the blocks (--use_zero_evict)"
        if self._batch.waiting.goes_before_new(now):
            return "full_now", "one that lost its blocks goes first"
        reason, text = self._batch.crowded(newcomer, self._reservations.num_open)
        if reason:
            return reason, text
        # a row is made when it has landed; until then it would go to the next one that waits
        self._batch.make_way(newcomer, lambda: self._reservations.need(submission), row=False)
        need = self._reservations.need(submission)
        if not self._headroom.has_room(need):
            return "full_now", f"{need} blocks wanted, {self._blocks.num_free} free"
        return "", ""

    def reserved_blocks(self, request_id: str) -> tuple[int, ...]:
        """Blocks of a reservation, relative block i at index i."""
        (request,) = self._open.choices(request_id)
        return tuple(request.block_ids)

    def on_receiving(self, request_id: str, attempt: int, now: float) -> None:
        """Blocks of the reservation keep coming: its time begins anew."""
        request = self._open.find(request_id, attempt)
        if request is not None and request.state is State.RESERVED:
            self._reservations.renew(request, now)

    def on_landed(self, request_id: str, attempt: int, now: float) -> None:
        """Every block of the reservation is written and verified."""
        request = self._open.find(request_id, attempt)
        if request is None or request.state is not State.RESERVED:
            return
        request.stamp(Moment.LANDED, now)
        self._reservations.on_landed(request)
        self._run_when_complete(request, now)

    def on_first_token(self, first: FirstToken, now: float) -> bool:
        """P's first token. False: the grant is unknown or ended. A repeat is accepted again."""
        request = self._open.find(first.request_id, first.attempt)
        if request is None or request.state is not State.RESERVED:
            return self._reservations.ran_by(first)
        ids = first.token_ids
        if len(ids) != request.num_draws or not all(map(self._admission.in_vocabulary, ids)):
            return False
        if not self._reservations.on_first_token(request, first, now):
            return False
        self._run_when_complete(request, now)
        return True

    def _run_when_complete(self, request: Request, now: float) -> None:
        first = self._reservations.close_when_complete(request)
        if first is None:
            return
        self._blocks.move(request.block_ids, Holding.STAGED, Holding.ACTIVE)
        request.num_computed = len(request.tokens)
        request.num_cached = first.cached_tokens
        self._prefix.publish(request)
        request.tokens.append(first.token_ids[0])
        request.first_ids, request.num_draws = first.token_ids, 1
        request.move(State.RUNNING)
        self._life.decode(request, now)

    def on_reservation_lost(self, request_id: str, attempt: int, now: float) -> None:
        """The link failed or the giver is gone: P owns the story, so nothing is put out."""
        request = self._open.find(request_id, attempt)
        if request is not None and request.state is State.RESERVED:
            self._life.close(request, now)

    def released(self, request_id: str, attempt: int) -> None:
        """The transport says that nothing can be written under an ended reservation any more."""
        self._reservations.released(request_id, attempt)

    def take_ended_reservations(self) -> list[tuple[str, int, bytes]]:
        """(request, attempt, grant) of reservations that will never run; the grant is empty when it was closed already."""
        return self._reservations.take_ended()

    # ---- P: after the first token ----

    def take_admitted(self) -> list[Request]:
        """Requests to be given away that were admitted since the last call: their offer goes out now."""
        admitted, self._batch.admitted = self._batch.admitted, []
        return admitted

    def on_given(self, request_id: str, attempt: int, now: float) -> None:
        """D has everything: our blocks are free, the request goes on there."""
        request = self._open.find(request_id, attempt)
        if request is not None and request.state is State.GIVING:
            self._life.close(request, now)

    def keep(self, request_id: str, attempt: int, now: float) -> None:
        """Nobody took it: decode here from now on, when this cache can hold it at all."""
        request = self._open.find(request_id, attempt)
        if request is None:
            return
        try:
            self._admission.check(request.submission, decode_here=True)
        except ContextLengthExceeded:
            text = "no decode instance took the request; try again later"
            self._life.finish(request, "no_decode_capacity", now, text)
            return
        request.kept = True
        if request.state is State.GIVING:
            request.move(State.RUNNING)
            self._life.decode(request, now)

    def fail(self, request_id: str, attempt: int, code: str, message: str, now: float) -> None:
        """End a request with an error that goes to its client."""
        request = self._open.find(request_id, attempt)
        if request is not None:
            self._life.finish(request, code, now, message)

    def abort(self, request_id: str, attempt: int, now: float) -> str:
        """End a request nobody waits for; attempt 0 means any. Returns its state, empty when it is unknown.

        It leaves a tombstone, so that a submission that arrives later, or once more, dies at once.
        """
        request = self._open.get(request_id)
        if request is None or attempt not in (0, request.submission.attempt):
            self._tombstones.bury(request_id, attempt, now)
            return ""
        self._tombstones.bury(request_id, request.submission.attempt, now)
        found = request.state.value
        self._life.finish(request, FINISH_ABORT, now)
        return found

    # ---- a step ----

    def has_work(self) -> bool:
        """Whether schedule() might compute something; it may still find that all have to wait."""
        return bool(self._batch.running or self._batch.waiting or self._batch.trial.pending)

    def next_deadline(self) -> float | None:
        """The earliest moment at which something expires; may be early, never late."""
        nearest = min(self._open.next_deadline, self._reservations.next_expiry)
        return None if nearest == NEVER else nearest

    def flush_cache(self) -> int:
        """Forget the prefixes that nobody uses now; returns how many blocks became free."""
        return self._blocks.flush()

    def take_cache_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes of blocks that became findable, and of those that are no more, since the last call."""
        return self._blocks.take_changes()

    def begin_drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True

    def schedule(self, now: float) -> StepPlan:
        """Expire what is late, then choose what the next step computes; the plan may be empty. Raises as BlockManager.check."""
        if now >= self._reservations.next_expiry:
            for request in self._reservations.expired(now):
                self._life.close(request, now)
        if now >= self._open.next_deadline:
            for request in self._open.late(now):
                self._life.finish(
                    request, "deadline_exceeded", now, "the request's deadline passed"
                )
            self._open.look_ahead()
        plan = self._batch.plan(now)
        self._check_running()
        return plan

    def schedule_ahead(self, now: float) -> StepPlan | None:
        """The step after the one that is being computed, where only its tokens could change it; else None. Its result is taken in after that one's."""
        expires = self.next_deadline()
        if expires is not None and now >= expires:
            return None
        plan = self._batch.plan_ahead()
        self._check_running()
        return plan

    def _check_running(self) -> None:
        if self._checks_all:
            for request in self._batch.running:
                self._blocks.check(request.block_ids, request.tag, request.hashes)

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """Take in what a step computed. Requests that ended meanwhile are passed over."""
        self._batch.trial.passed()
        planned, decoding = self._batch.take_planned(in_columns=not result.failed_rows)
        first = sum(plan.sample[: decoding.start])
        if decoding:
            token_ids = result.token_ids[first : first + len(decoding)]
            for entry, request in self._batch.take_tokens(token_ids, self._outbox.outputs):
                self._look_at(request, entry, now)
        # after the decodes, because these may become such
        self._apply_rows(plan, result, planned, range(decoding.start), 0, now)
        rest = range(decoding.stop, len(planned))
        self._apply_rows(plan, result, planned, rest, first + len(decoding), now)

    def _apply_rows(
        self,
        plan: StepPlan,
        result: StepResult,
        planned: list[Request],
        indices: range,
        at: int,
        now: float,
    ) -> None:
        """The general case, for some rows of the plan. `at`: in the result, of the first token drawn for them."""
        for index in indices:
            request, row, draws = planned[index], plan.rows[index], plan.sample[index]
            first, at = at, at + draws
            if request.state is not State.RUNNING or request.row != row:
                continue
            if row in result.failed_rows:
                self._life.finish(request, "internal_error", now, result.failed_rows[row])
                continue
            request.num_computed += plan.num_tokens[index]
            if index in result.prompt_logprobs:
                request.prompt_logprobs += result.prompt_logprobs[index]
            if not draws or not request.first_ids:
                if request.num_computed >= request.publish_at:
                    self._prefix.publish(request)
                if draws:
                    self._life.on_first(request, result, first, draws, now)
                continue
            token_id = result.token_ids[first]
            entry = self._outbox.put_token(request, token_id, result.logprobs.get(first))
            request.tokens.append(token_id)
            self._look_at(request, entry, now)

    def _look_at(self, request: Request, entry: int, now: float) -> None:
        """It has a new token: another block may be full, or the answer complete. `entry`: the token's in the outputs."""
        if request.num_computed >= request.publish_at:
            self._prefix.publish(request)
        if request.complete:
            self._outbox.put_reason(entry, request)
            self._life.close(request, now)
            self._outbox.describe(request, entry)
        else:
            self._batch.settle(request)

    def on_crash(self, plan: StepPlan, message: str, now: float) -> bool:
        """The computation of a planned step raised. False: it was no request's fault, the executor is broken.

        message: for the client of a request that raised alone.
        """
        self._batch.trial.num_crashes += 1
        suspects = self._batch.rewind(plan)
        if len(plan.rows) > 1:
            self._batch.trial.suspect(suspects)
            return True
        if not plan.started or plan.started[0].request_id:
            for request in suspects:
                self._life.finish(request, "internal_error", now, message)
            self._batch.trial.found()
            return True
        return False

    # ---- what others see ----

    def take_outputs(self) -> Outputs:
        """All entries since the last call."""
        return self._outbox.take()

    def ledger(self) -> dict[str, int]:
        """Blocks by holding, requests by state, rows in use (SPEC 7.7)."""
        return {
            **self._blocks.counts(),
            **self._open.counts(),
            **self._prefix.counts(),
            "rows": self._batch.num_rows,
            "forked_choices": self._life.num_forked,
            "crashed_steps": self._batch.trial.num_crashes,
            "copied_blocks": self._batch.num_copied,
        }

    def assert_empty(self) -> None:
        """Every block and row is free and nothing is remembered; closes every test."""
        assert not len(self._open), self._open.counts()
        assert self._blocks.num_free == self._blocks.num_blocks, self._blocks.counts()
        self._batch.assert_empty()
        self._reservations.assert_empty()
