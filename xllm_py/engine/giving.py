"""P's side of handoffs: acts out core/handoff.Giver for every request that is to be given away.

Offers a request when it is admitted, pushes blocks, commits, tells the first token, and frees the blocks on the peer's
acknowledgement. Part of engine/handoff_agent; it decides nothing the machine can decide. The peer's answer is taken even while a
step is computed: what the finished layers hold follows at once, the other layers leave as they are computed.

Before a step is computed, the grants of requests that ended are abandoned: from then on the transport reads none of their
blocks, which may belong to somebody else in that very step.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base import failpoints, ids, log
from xllm_py.base.errors import LayoutMismatch
from xllm_py.base.hashing import prompt_digest
from xllm_py.core import handoff
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.journey import Moment
from xllm_py.core.kv_memory import KvLayout
from xllm_py.core.kv_plan import Ranks
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import HOLDS_BLOCKS, FirstToken, Offer, OfferAnswer, Request, State
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.leaving import Leaving
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, KvTransport
from xllm_py.wire import messages as m

_log = log.get(__name__)


@dataclass(slots=True)
class _Giving:
    """One handoff under way on P."""

    machine: handoff.Giver
    request: Request
    grant: bytes = b""
    read_grant: bytes = b""  # with which D is to fetch; empty: we push
    block_size: int = (
        0  # tokens of the blocks that are pushed, ours or a part of ours; 0: D has not said
    )
    num_bytes: int = 0
    seconds: float = 0.0
    exposed_s: float = 0.0


class GivingAgent:
    """All handoffs under way on this P."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        transport: KvTransport | None,
        config: SchedulerConfig,
        model_fingerprint: str,
        layout: KvLayout,
        send: Callable[[m.Event], None],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._scheduler = scheduler
        self._transport = transport
        self._config = config
        self._model_fingerprint = model_fingerprint
        self._layout = layout
        self._send = send
        self._giving: dict[str, _Giving] = {}
        self._by_grant: dict[bytes, _Giving] = {}
        self._plan: StepPlan | None = None  # of the step that runs now, with the places of its rows
        self._index_of_row: dict[int, int] = {}
        self._leaving = Leaving(layout, transport)
        self.layer_done = self._leaving.stored
        self._offers: list[Offer] = []
        self._jitter = random.Random()

    @property
    def num_open(self) -> int:
        """Handoffs under way, for the ledger."""
        return len(self._giving)

    def next_tick(self) -> float | None:
        """The earliest timer of any machine."""
        ticks = [giving.machine.next_tick for giving in self._giving.values()]
        return min((tick for tick in ticks if tick is not None), default=None)

    def on_time(self, now: float) -> None:
        """Let timers fire."""
        for giving in list(self._giving.values()):
            tick = giving.machine.next_tick
            if tick is not None and tick <= now:
                self._act(giving, giving.machine.on_tick(now), now)

    def before_step(self, plan: StepPlan, now: float) -> None:
        """Let go of what ended, offer what was admitted, claim the blocks that this step completes."""
        self.drop_ended(now)  # first: a new attempt may take the place of one that ended
        for request in self._scheduler.take_admitted():
            self._begin(request, now)
        if self._offers:  # now, so that the peers answer while the step computes
            self._send(m.OffersOut(offers=self._offers))
            self._offers = []
        self._plan = None if plan.empty else plan
        self._index_of_row = {row: i for i, row in enumerate(plan.rows)} if self._giving else {}
        self._leaving.begin()
        for giving in self._by_grant.values():
            self._claim(giving)

    @property
    def awaits_answer(self) -> bool:
        """Whether some peer was asked and has not answered yet."""
        offered = handoff.GiverState.OFFERED
        return any(giving.machine.state is offered for giving in self._giving.values())

    def on_crash(self) -> None:
        """The step raised: what it was to complete is sent with a later one; a block sent twice has the same bytes."""
        for grant, first in self._leaving.claimed():
            if grant in self._by_grant:
                self._by_grant[grant].machine.unclaim(first)

    def after_step(self, now: float) -> None:
        """Tell the machines how far the prompts are."""
        self._plan = None
        self._leaving.begin()
        self.drop_ended(now)
        for giving in list(self._giving.values()):
            self._on_computed(giving, now)

    def on_transport(self, event: KvEvent, now: float) -> bool:
        """Take an event of one of our grants; False when it is none of ours."""
        giving = self._by_grant.get(event.grant)
        if giving is None:
            return False
        giving.num_bytes, giving.seconds = event.num_bytes, event.seconds
        giving.exposed_s = event.exposed_s
        if event.kind is KvEventKind.ACKNOWLEDGED:
            self._act(giving, giving.machine.on_acknowledged(), now)
        elif event.kind is KvEventKind.FAILED:
            _log.warning("push failed", request=giving.request.request_id, reason=event.text)
            self._act(giving, giving.machine.on_link_failed(event.text), now)
        return True

    def _begin(self, request: Request, now: float) -> None:
        giving = _Giving(
            machine=handoff.Giver(
                now=now,
                deadline=request.deadline,
                local_decode=self._config.enable_local_decode,
                jitter=self._jitter.random(),
            ),
            request=request,
            read_grant=ids.grant_id() if self._config.kv_pull else b"",
        )
        self._giving[request.request_id] = giving
        self._act(giving, giving.machine.start(), now)

    def on_answers(self, command: m.Answers, now: float) -> None:
        """P: what D said to an offer; also in mid-step."""
        for answer in command.answers:
            giving = self._giving.get(answer.request_id)
            if giving is None or giving.request.submission.attempt != answer.attempt:
                self._decline(answer)
                continue
            answer = self._believed(giving, answer)
            if answer.grant:
                giving.request.stamp(Moment.GRANTED, now)
                giving.block_size = answer.block_size
            self._act(giving, giving.machine.on_answer(answer, now), now)
            self._claim(giving)

    def _believed(self, giving: _Giving, answer: OfferAnswer) -> OfferAnswer:
        """As D said it, or as a refusal when its blocks are no part of ours."""
        size, length = answer.block_size, giving.request.num_submitted
        fits = size >= 1 and self._layout.block_size % size == 0
        if not answer.grant or (fits and answer.num_blocks == -(-length // size)):
            return answer
        text = "the decode instance grants blocks that are no part of ours"
        return dataclasses.replace(answer, grant=b"", refusal="layout_differs", text=text)

    def _decline(self, answer: OfferAnswer) -> None:
        """The request ended while D was asked; the Cancel that was sent then has ended the reservation too."""
        _log.debug("answer to an offer that ended", request=answer.request_id)

    def on_first_taken(self, command: m.FirstTaken, now: float) -> None:
        """P: whether D knew the grant of a first token."""
        reached = command.reached or [True] * len(command.accepted)
        entries = zip(command.request_ids, command.attempts, command.accepted, reached, strict=True)
        for request_id, attempt, accepted, answered in entries:
            giving = self._giving.get(request_id)
            if giving is not None and giving.request.submission.attempt == attempt:
                actions = giving.machine.on_first_delivered(accepted, answered, now)
                self._act(giving, actions, now)

    def _claim(self, giving: _Giving) -> None:
        """Blocks that will be complete after the step that runs leave with it, layer by layer; those layers that are stored
        already leave now.
        """
        plan, request = self._plan, giving.request
        if plan is None or not giving.grant or request.state is not State.RUNNING:
            return
        index = self._index_of_row.get(request.row)
        if index is None:
            return
        computed = plan.num_computed[index] + plan.num_tokens[index]
        first, count = giving.machine.claim(_complete_blocks(giving, computed))
        if not count:
            return
        block_ids = self._pieces(giving, first, count)
        self._leaving.claim(giving.grant, first, block_ids, giving.block_size)

    def _pieces(self, giving: _Giving, first: int, count: int) -> tuple[int, ...]:
        """The blocks that D counts as first...; they may be parts of ours."""
        pieces, held = self._layout.block_size // giving.block_size, giving.request.block_ids
        places = (divmod(index, pieces) for index in range(first, first + count))
        return tuple(held[block] * pieces + piece for block, piece in places)

    def _on_computed(self, giving: _Giving, now: float) -> None:
        request = giving.request
        if request.state not in HOLDS_BLOCKS:
            return
        complete = _complete_blocks(giving, request.num_computed)
        first_known = request.state is State.GIVING
        self._act(giving, giving.machine.on_computed(complete, first_known), now)

    def drop_ended(self, now: float) -> None:
        """Requests that ended (stop, abort, deadline, failure): nothing may read their blocks from here on."""
        for giving in list(self._giving.values()):
            if giving.request.state is State.FINISHED:
                complete = giving.request.complete
                self._act(giving, giving.machine.on_ended(complete), now)

    def _act(self, giving: _Giving, actions: list[handoff.Action], now: float) -> None:
        for action in actions:
            self._act_one(giving, action, now)
        if giving.machine.closed:
            self._forget(giving)

    def _act_one(self, giving: _Giving, action: handoff.Action, now: float) -> None:
        match action:
            case handoff.SendOffer():
                giving.request.stamp(Moment.OFFERED, now)
                self._offers.append(self._offer(giving, now))
            case handoff.Connect(answer=answer):
                self._connect(giving, answer)
            case handoff.Push(first=first, count=count):
                self._push(giving, first, count)
            case handoff.Commit():
                failpoints.hit("p.kv.pre_commit")
                self._leaving.transport.commit(giving.grant)
            case handoff.SendFirst():
                self._send_first(giving)
            case handoff.CancelPeer():
                self._cancel_peer(giving)
            case handoff.Verdict(kind=kind, reason=reason):
                self._tell_verdict(giving, kind, reason)
            case _:
                self._settle(giving, action, now)

    def _settle(self, giving: _Giving, action: handoff.Action, now: float) -> None:
        """The three ways in which the scheduler gets the request back or is rid of it."""
        self._let_go(giving)
        key = (giving.request.request_id, giving.request.submission.attempt)
        match action:
            case handoff.FreeBlocks():
                failpoints.hit("p.release")
                self._scheduler.on_given(*key, now)
            case handoff.Keep():
                self._scheduler.keep(*key, now)
            case handoff.Fail(code=code, message=message):
                self._scheduler.fail(*key, code, message, now)

    def _offer(self, giving: _Giving, now: float) -> Offer:
        """Names and addresses of this instance are filled in by the API process, which knows them."""
        request = giving.request
        left_s = max(0.0, request.deadline - now)
        return Offer(
            submission=dataclasses.replace(request.submission, timeout_s=left_s),
            giver_name="",
            giver_address="",
            giver_incarnation="",
            model_fingerprint=self._model_fingerprint,
            layout_fingerprint=self._layout.fingerprint,
            block_size=self._layout.block_size,
            read_grant=giving.read_grant,
            endpoints=self._ranks.endpoints if giving.read_grant else (),
        )

    def _connect(self, giving: _Giving, answer: OfferAnswer) -> None:
        receiver = giving.request.submission.receiver
        transport = self._leaving.transport
        if receiver is None:
            raise LayoutMismatch("a grant for a request without a receiver")
        giving.grant = answer.grant
        self._by_grant[answer.grant] = giving
        transport.connect(
            GiverGrant(
                grant=answer.grant,
                endpoints=answer.endpoints,
                peer_ranks=len(answer.endpoints),
                peer_incarnation=receiver.incarnation,
                block_size=giving.block_size,
                prompt_digest=prompt_digest(giving.request.tokens[: giving.request.num_submitted]),
                read_grant=giving.read_grant,
                stream=answer.stream,
            )
        )

    def _push(self, giving: _Giving, first: int, count: int) -> None:
        transport = self._leaving.transport
        block_ids = self._pieces(giving, first, count)
        for layer in range(self._layout.num_layers):
            transport.push(giving.grant, layer, first, block_ids)

    def _send_first(self, giving: _Giving) -> None:
        failpoints.hit("p.first_token")
        submission = giving.request.submission
        if submission.receiver is None:
            raise LayoutMismatch("a first token for a request without a receiver")
        first = FirstToken(
            request_id=submission.request_id,
            attempt=submission.attempt,
            grant=giving.grant,
            token_ids=giving.request.first_ids,
            cached_tokens=giving.request.num_cached,
        )
        self._send(m.FirstTokensOut(receivers=[submission.receiver.address], firsts=[first]))

    def _cancel_peer(self, giving: _Giving) -> None:
        self._let_go(giving)
        submission = giving.request.submission
        if submission.receiver is not None:
            self._send(
                m.CancelsOut(
                    receivers=[submission.receiver.address],
                    request_ids=[submission.request_id],
                    attempts=[submission.attempt],
                )
            )

    def _let_go(self, giving: _Giving) -> None:
        """After this the transport reads none of the request's blocks."""
        if self._transport is not None and giving.grant in self._by_grant:
            del self._by_grant[giving.grant]
            self._transport.abandon(giving.grant)

    def _forget(self, giving: _Giving) -> None:
        self._let_go(giving)
        self._giving.pop(giving.request.request_id, None)

    def _tell_verdict(self, giving: _Giving, kind: str, reason: str) -> None:
        submission = giving.request.submission
        self._send(
            m.Verdicts(
                request_ids=[submission.request_id],
                attempts=[submission.attempt],
                kinds=[kind],
                reasons=[reason],
                num_bytes=[giving.num_bytes],
                seconds=[giving.seconds],
                exposed=[giving.exposed_s],
            )
        )


def _complete_blocks(giving: _Giving, num_computed: int) -> int:
    """Prompt blocks whose KV is final: full ones, and the partial last one when the prompt is done. 0 before D has granted any."""
    size, length = giving.block_size, giving.request.num_submitted
    if not size:
        return 0
    return -(-length // size) if num_computed >= length else num_computed // size
