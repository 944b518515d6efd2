"""The scheduler: schedule() gives a plan, apply() takes its result; nothing in between is its business.

There are no phases: each request has tokens known and tokens computed, and a step lets the computed catch up with the known.
A prefill instance is one whose submissions name a receiver, a decode instance one whose requests arrive by `reserve`.

It owns the requests and their states. What may come in is decided by core/admission, who runs by core/batch, what has been
promised to givers by core/reservations, who holds which block by core/block_manager. Pure: `now` is a parameter. Called by
engine/loop and engine/handoff_agent, and by nobody else.
"""

from __future__ import annotations

from xllm_py.base.errors import ContextLengthExceeded, Draining, QueueFull, RequestError
from xllm_py.core.admission import Admission, Tombstones
from xllm_py.core.batch import Batch
from xllm_py.core.block_manager import BlockManager, Holding
from xllm_py.core.config import ModelFacts, SchedulerConfig
from xllm_py.core.journey import Moment
from xllm_py.core.plan import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    Outputs,
    StepPlan,
    StepResult,
)
from xllm_py.core.prefix_cache import PrefixCache
from xllm_py.core.request import (
    HOLDS_BLOCKS,
    FirstToken,
    Offer,
    OfferAnswer,
    Request,
    State,
    Submission,
)
from xllm_py.core.reservations import Reservations, refusal

_NEVER = float("inf")


class Scheduler:
    """All requests of one engine."""

    def __init__(
        self,
        config: SchedulerConfig,
        facts: ModelFacts,
        num_blocks: int,
        block_size: int,
        prefix_root: bytes = b"",
    ) -> None:
        """prefix_root: the parent of all block hashes; empty: no prefix cache."""
        self._config = config
        self._admission = Admission(config, facts, num_blocks, block_size)
        self._blocks = BlockManager(num_blocks, block_size)
        self._prefix = PrefixCache(self._blocks, prefix_root)
        self._batch = Batch(config, self._blocks, self._prefix)
        self._reservations = Reservations(config.grant_ttl_s, self._blocks, self._prefix)
        self._tombstones = Tombstones()
        self._requests: dict[str, Request] = {}
        self._outputs = Outputs()
        self._next_deadline = _NEVER
        self.draining = False

    # ---- requests come in ----

    def add(self, submission: Submission, now: float) -> None:
        """Queue a request. Raises the RequestError leaf that says why not; a repeat is ignored."""
        known = self._requests.get(submission.request_id)
        if known is not None and known.submission.attempt >= submission.attempt:
            return
        if self.draining:
            raise Draining("this instance is draining; send the request to another one")
        if len(self._batch.waiting) >= self._config.max_queue:
            raise QueueFull(f"{self._config.max_queue} requests wait already", retry_after_s=1.0)
        self._admission.check(submission, decode_here=submission.receiver is None)
        if self._tombstones.has(submission.request_id, submission.attempt, now):
            self._put_finish(submission, FINISH_ABORT)
            return
        if known is not None:
            self._finish(known, FINISH_ABORT, now)
        self._batch.waiting.append(self._make(submission, State.WAITING, now))

    def _make(self, submission: Submission, state: State, now: float) -> Request:
        tokens = [*submission.prompt_ids, *submission.generated_ids]
        request = Request(
            submission=submission,
            state=state,
            deadline=now + submission.timeout_s,
            tokens=tokens,
            num_prompt=len(submission.prompt_ids),
            num_submitted=len(tokens),
            max_len=self._admission.max_len(submission),
            stop_ids=self._admission.stop_ids(submission),
            taken=state is State.RESERVED,
        )
        request.stamp(Moment.RECEIVED, now)
        self._requests[request.request_id] = request
        self._next_deadline = min(self._next_deadline, request.deadline)
        return request

    def refuse(self, submission: Submission, error: RequestError) -> None:
        """Put the refusal of `add` on the road a token takes."""
        self._put_finish(submission, error.code, error.message)

    # ---- D: reservations ----

    def reserve(self, offer: Offer, grant: bytes, now: float) -> OfferAnswer:
        """Reserve the blocks of an offered prompt, or refuse with a reason of SPEC 6.4.

        `grant` are 16 random bytes, used only when this is a new reservation: a repeated offer gets the first answer again,
        with a new expiry.
        """
        submission = offer.submission
        known = self._requests.get(submission.request_id)
        if known is not None and known.submission.attempt >= submission.attempt:
            return self._reservations.repeat(known, submission.attempt, now)
        reason, text = self._refusal(submission, now)
        if reason:
            return refusal(submission.request_id, submission.attempt, reason, text)
        if known is not None:
            self._finish(known, FINISH_ABORT, now)
        request = self._make(submission, State.RESERVED, now)
        return self._reservations.open(request, grant, now)

    def _refusal(self, submission: Submission, now: float) -> tuple[str, str]:
        """Reason and text, both empty when it can be taken."""
        if self.draining:
            return "draining", "this instance is draining"
        if self._tombstones.has(submission.request_id, submission.attempt, now):
            return "cancelled", "the request was cancelled before it was offered"
        if self._reservations.has_run(submission.request_id, submission.attempt):
            return "cancelled", "the request was taken before and has ended"
        if submission.timeout_s <= 0:
            return "deadline_passed", "no time is left"
        try:
            self._admission.check(submission, decode_here=True)
        except ContextLengthExceeded as error:
            return "never_fits", error.message
        except RequestError as error:
            return "invalid", error.message
        need = self._reservations.need(submission)
        if not self._batch.has_room(need) or self._batch.preempted:
            return "full_now", f"{need} blocks wanted, {self._blocks.num_free} free"
        taken = len(self._batch.running) + len(self._batch.waiting) + self._reservations.num_open
        if taken >= self._config.max_seqs_per_batch:
            return "full_now", f"{taken} requests run or are promised already"
        return "", ""

    def reserved_blocks(self, request_id: str) -> tuple[int, ...]:
        """Blocks of a reservation, relative block i at index i."""
        return tuple(self._requests[request_id].block_ids)

    def on_receiving(self, request_id: str, attempt: int, now: float) -> None:
        """Blocks of the reservation keep coming: its time begins anew."""
        request = self._find(request_id, attempt)
        if request is not None and request.state is State.RESERVED:
            self._reservations.renew(request, now)

    def on_landed(self, request_id: str, attempt: int, now: float) -> None:
        """Every block of the reservation is written and verified."""
        request = self._find(request_id, attempt)
        if request is None or request.state is not State.RESERVED:
            return
        request.stamp(Moment.LANDED, now)
        self._reservations.on_landed(request)
        self._run_when_complete(request, now)

    def on_first_token(self, first: FirstToken, now: float) -> bool:
        """P's first token. False: the grant is unknown or ended. A repeat is accepted again."""
        request = self._find(first.request_id, first.attempt)
        if request is None or request.state is not State.RESERVED:
            return self._reservations.ran_by(first)
        if not self._admission.in_vocabulary(first.token_id):
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
        request.tokens.append(first.token_id)
        request.move(State.RUNNING)
        request.stamp(Moment.DECODING, now)
        self._batch.run(request)

    def on_reservation_lost(self, request_id: str, attempt: int, now: float) -> None:
        """The link failed or the giver is gone: P owns the story, so nothing is put out."""
        request = self._find(request_id, attempt)
        if request is not None and request.state is State.RESERVED:
            self._close(request, now)

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
        request = self._find(request_id, attempt)
        if request is not None and request.state is State.GIVING:
            self._close(request, now)

    def keep(self, request_id: str, attempt: int, now: float) -> None:
        """Nobody took it: decode here from now on, when this cache can hold it at all."""
        request = self._find(request_id, attempt)
        if request is None:
            return
        try:
            self._admission.check(request.submission, decode_here=True)
        except ContextLengthExceeded:
            text = "no decode instance took the request; try again later"
            self._finish(request, "no_decode_capacity", now, text)
            return
        request.kept = True
        if request.state is State.GIVING:
            request.move(State.RUNNING)
            request.stamp(Moment.DECODING, now)
            self._batch.run(request)

    def fail(self, request_id: str, attempt: int, code: str, message: str, now: float) -> None:
        """End a request with an error that goes to its client."""
        request = self._find(request_id, attempt)
        if request is not None:
            self._finish(request, code, now, message)

    def abort(self, request_id: str, attempt: int, now: float) -> str:
        """End a request nobody waits for; attempt 0 means any. Returns its state, empty when it is unknown.

        It leaves a tombstone, so that a submission that arrives later, or once more, dies at once.
        """
        request = self._requests.get(request_id)
        if request is None or attempt not in (0, request.submission.attempt):
            self._tombstones.bury(request_id, attempt, now)
            return ""
        self._tombstones.bury(request_id, request.submission.attempt, now)
        found = request.state.value
        self._finish(request, FINISH_ABORT, now)
        return found

    def _find(self, request_id: str, attempt: int) -> Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.submission.attempt == attempt else None

    # ---- a step ----

    def has_work(self) -> bool:
        """Whether schedule() might compute something; it may still find that all have to wait."""
        return bool(self._batch.running or self._batch.waiting)

    def next_deadline(self) -> float | None:
        """The earliest moment at which something expires; may be early, never late."""
        nearest = min(self._next_deadline, self._reservations.next_expiry)
        return None if nearest == _NEVER else nearest

    def begin_drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True

    def schedule(self, now: float) -> StepPlan:
        """Expire what is late, then choose what the next step computes; the plan may be empty."""
        if now >= self._reservations.next_expiry:
            for request in self._reservations.expired(now):
                self._close(request, now)
        if now >= self._next_deadline:
            self._expire(now)
        return self._batch.plan(now)

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """Take in what a step computed. Requests that ended meanwhile are passed over."""
        tokens = iter(result.token_ids)
        outputs = self._outputs
        failed = result.failed_rows
        columns = zip(
            self._batch.take_planned(), plan.rows, plan.num_tokens, plan.sample, strict=True
        )
        for request, row, count, sampled in columns:
            token = next(tokens) if sampled else -1
            if request.state is not State.RUNNING or request.row != row:
                continue
            if failed and row in failed:
                self._finish(request, "internal_error", now, failed[row])
                continue
            request.num_computed += count
            if request.num_computed >= request.publish_at:
                self._prefix.publish(request)
            if not sampled:
                continue
            known = request.tokens
            known.append(token)
            outputs.request_ids.append(request.submission.request_id)
            outputs.attempts.append(request.submission.attempt)
            outputs.choices.append(0)
            outputs.positions.append(len(known) - request.num_prompt - 1)
            outputs.token_ids.append(token)
            if len(known) < request.max_len and token not in request.stop_ids:
                outputs.finish_reasons.append("")
                if len(known) == request.num_submitted + 1:
                    self._on_first(request, now)
            else:
                stopped = token in request.stop_ids
                outputs.finish_reasons.append(FINISH_STOP if stopped else FINISH_LENGTH)
                request.stamp(Moment.FIRST_TOKEN, now)
                self._close(request, now)
                self._outputs.describe(request.journey_s(), request.num_cached)

    def _on_first(self, request: Request, now: float) -> None:
        request.stamp(Moment.FIRST_TOKEN, now)
        if request.to_give:
            self._batch.remove(request)
            request.move(State.GIVING)
        else:
            request.stamp(Moment.DECODING, now)
        self._outputs.describe(request.journey_s(), request.num_cached)

    # ---- endings ----

    def _expire(self, now: float) -> None:
        late = [request for request in self._requests.values() if request.deadline <= now]
        for request in late:
            self._finish(request, "deadline_exceeded", now, "the request's deadline passed")
        deadlines = (request.deadline for request in self._requests.values())
        self._next_deadline = min(deadlines, default=_NEVER)

    def _finish(self, request: Request, reason: str, now: float, message: str = "") -> None:
        """End a request with an entry that carries no token; a reservation ends in silence, P owns its story."""
        reserved = request.state is State.RESERVED
        self._close(request, now)
        if reserved:
            return
        self._put_finish(request.submission, reason, message, request.num_generated)
        self._outputs.describe(request.journey_s(), request.num_cached)

    def _put_finish(
        self, submission: Submission, reason: str, message: str = "", position: int = 0
    ) -> None:
        key = (submission.request_id, submission.attempt)
        self._outputs.add(*key, position=position, finish_reason=reason, message=message)

    def _close(self, request: Request, now: float) -> None:
        """Leave every queue, give everything back, be forgotten."""
        if request.state is State.RESERVED:
            self._reservations.end(request)
            self._tombstones.bury(request.request_id, request.submission.attempt, now)
        else:
            self._batch.remove(request)
            if request.state in HOLDS_BLOCKS:
                self._blocks.free(request.block_ids)
                request.block_ids = []
            self._reservations.ran(request)
        request.stamp(Moment.FINISHED, now)
        request.move(State.FINISHED)
        del self._requests[request.request_id]

    # ---- what others see ----

    def take_outputs(self) -> Outputs:
        """All entries since the last call."""
        outputs, self._outputs = self._outputs, Outputs()
        return outputs

    def ledger(self) -> dict[str, int]:
        """Blocks by holding, requests by state, rows in use (SPEC 7.7)."""
        counts = dict.fromkeys(State, 0)
        for request in self._requests.values():
            counts[request.state] += 1
        return {
            **self._blocks.counts(),
            **{f"requests_{state.value}": count for state, count in counts.items()},
            "requests_open": len(self._requests),
            **self._prefix.counts(),
            "rows": self._batch.num_rows,
        }

    def assert_empty(self) -> None:
        """Every block and row is free and nothing is remembered; closes every test."""
        assert not self._requests, list(self._requests)
        assert self._blocks.num_free == self._blocks.num_blocks, self._blocks.counts()
        self._batch.assert_empty()
        self._reservations.assert_empty()
