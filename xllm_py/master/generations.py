"""The rpc_server_port service: instances' streams of outputs, heartbeats, cards of others.

Every entry of a stream goes through the token log (cluster/inflight); readers in cluster_backend are woken when their request
has news and read from the log only. Answers to the instance: acknowledged, send again, cancel. Implements
control.server.MasterHandlers.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from xllm_py.base import failpoints, log
from xllm_py.base.metrics import Metrics
from xllm_py.cluster.inflight import Entry, Inflight, Judged, Judgement, RequestLog
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.routing import Route
from xllm_py.core.plan import Outputs
from xllm_py.core.request import Submission
from xllm_py.master.instance_manager import InstanceManager
from xllm_py.master.journeys import Record, Transfer
from xllm_py.wire.control_messages import GenerationsDown, GenerationsUp, Heartbeat, HeartbeatReply
from xllm_py.wire.messages import Verdicts

_log = log.get(__name__)


class _Answer:
    """What one message is answered with; one entry per request and choice, however many rows it had."""

    def __init__(self) -> None:
        self._acks: dict[tuple[str, int, int], int] = {}
        self.again: dict[tuple[str, int, int], int] = {}
        self.cancels: set[tuple[str, int]] = set()

    def acknowledge(self, request_id: str, entry: Entry, position: int) -> None:
        """Everything before `position` is in the log."""
        key = (request_id, entry.attempt, entry.choice)
        self._acks[key] = max(position, self._acks.get(key, 0))

    def down(self) -> GenerationsDown:
        """As columns."""
        down = GenerationsDown()
        for (request_id, attempt, choice), position in self._acks.items():
            down.acks.add(request_id, attempt, choice, position)
        for (request_id, attempt, choice), position in self.again.items():
            down.again.add(request_id, attempt, choice, position)
        for request_id, attempt in sorted(self.cancels):
            down.cancels.request_ids.append(request_id)
            down.cancels.attempts.append(attempt)
        return down


@dataclass(slots=True, kw_only=True)
class OpenRequest:
    """A request that somebody reads: its log, its record, and the bell that rings for news."""

    log: RequestLog
    record: Record
    news: asyncio.Event = field(default_factory=asyncio.Event)
    cached_tokens: int = 0
    has_told: bool = False  # an earlier attempt did; how much it had cached stands


class Generations:
    """All open requests of one master, fed by instances' streams."""

    def __init__(self, *, manager: InstanceManager, metrics: Metrics) -> None:
        self._manager = manager
        self._inflight = Inflight()
        self._open: dict[str, OpenRequest] = {}
        self.num_streams = 0
        self._stale = metrics.counter("stale_messages", "Entries of requests or attempts not open")
        self._divergence = metrics.counter("divergence", "Reports that contradict the token log")
        self._handoffs = metrics.counter("handoff_offers", "Handoffs by their end", ["result"])
        self._moved = metrics.counter("kv_transfer_bytes", "KV bytes moved", ["direction"])
        self._seconds = metrics.seconds("kv_transfer_seconds", "KV transfer of a handoff")
        self._exposed = metrics.seconds(
            "kv_transfer_exposed_seconds", "Part of it that no computation hid"
        )
        self.on_beat: Callable[[Heartbeat], int] = lambda beat: (
            0
        )  # what is wanted of its cache's news
        self.order: Callable[[HeartbeatReply, str], HeartbeatReply] = lambda reply, incarnation: (
            reply
        )  # what the elected master adds to the answer
        self.on_handoff_lost: list[Callable[[str, str], None]] = []  # incarnations of P and D
        manager.on_lost.append(self._on_lost)

    # ---- requests ----

    def open(
        self, submission: Submission, attempt: int, route: Route, record: Record
    ) -> OpenRequest:
        """Begin to log a request that is about to be submitted."""
        opened = OpenRequest(
            log=self._inflight.open(
                submission.request_id,
                attempt=attempt,
                first=route.first.incarnation_id,
                decode=route.decode.incarnation_id if route.decode else "",
                max_tokens=submission.sampling.max_tokens,
                num_choices=submission.sampling.best_of,
                told=submission.generated_ids,
            ),
            record=record,
        )
        self._open[submission.request_id] = opened
        return opened

    def again(self, opened: OpenRequest, attempt: int, route: Route) -> None:
        """Another attempt goes on with the log."""
        opened.has_told = opened.has_told or any(choice.ids for choice in opened.log.choices)
        opened.log.again(
            attempt=attempt,
            first=route.first.incarnation_id,
            decode=route.decode.incarnation_id if route.decode else "",
        )

    def close(self, request_id: str) -> None:
        """Nobody reads it any more; what instances still report of it is answered with a cancel."""
        self._open.pop(request_id, None)
        self._inflight.close(request_id)

    def ledger(self) -> dict[str, int]:
        """Counts; all 0 when idle."""
        return self._inflight.ledger()

    def _on_lost(self, card: Card, reason: str, died: bool) -> None:
        text = f"an instance that served the request was lost ({reason}); send it again"
        for request_id in self._inflight.on_lost(card.incarnation_id, text, died=died):
            self._open[request_id].news.set()

    # ---- MasterHandlers ----

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """See MasterHandlers."""
        reply = self._manager.on_heartbeat(beat)
        if not reply.known:
            return reply
        reply = dataclasses.replace(reply, cache_next=self.on_beat(beat))
        return self.order(reply, beat.incarnation)

    async def get_instance_info(self, name: str) -> bytes:
        """See MasterHandlers."""
        return self._manager.card_of(name)

    async def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        """See MasterHandlers. The first message says whose stream it is; relayed messages name their own instance."""
        owner = ""
        self.num_streams += 1
        try:
            async for up in ups:
                if not owner:
                    owner = up.incarnation
                    self._manager.on_stream_opened(owner)
                self._manager.on_spoke(owner)
                down = self.take(up)
                if not down.empty:
                    yield down
        finally:
            self.num_streams -= 1
            if owner:
                self._manager.on_stream_ended(owner)

    # ---- what instances report ----

    def take(self, up: GenerationsUp) -> GenerationsDown:
        """Put one message into the log; the answer for the instance."""
        answer = _Answer()
        outputs = up.outputs
        if outputs.request_ids:
            failpoints.hit("m.delta.pre_accept")
        for index, request_id in enumerate(outputs.request_ids):
            entry = _entry(up, index)
            judged = self._inflight.take(request_id, entry)
            opened = self._open.get(request_id)
            self._judge(answer, request_id, entry, judged)
            if opened is not None and judged.judgement is not Judgement.STALE:
                if _gives(opened.log, up.incarnation):
                    answer.acknowledge(request_id, entry, judged.next)
                self._note(opened, outputs, index, up.incarnation)
        self._take_verdicts(up.incarnation, up.verdicts)
        if outputs.request_ids:
            failpoints.hit("m.delta.post_accept")
        return answer.down()

    def _judge(self, answer: _Answer, request_id: str, entry: Entry, judged: Judged) -> None:
        """Count what is wrong; say what the instance needs to hear."""
        ended = bool(entry.finish_reason)
        match judged.judgement:
            case Judgement.STALE:
                self._stale.inc()
                if ended:
                    answer.acknowledge(request_id, entry, entry.position + 1)
                else:
                    answer.cancels.add((request_id, entry.attempt))
            case Judgement.DIVERGED:
                self._divergence.inc()
                _log.error("reports diverge", request=request_id, position=entry.position)
                answer.cancels.add((request_id, entry.attempt))
            case Judgement.GAP:
                answer.again[request_id, entry.attempt, entry.choice] = judged.next
            case _ if ended:  # a finish that is held is in the log too
                answer.acknowledge(request_id, entry, entry.position + 1)

    def _note(self, opened: OpenRequest, outputs: Outputs, index: int, incarnation: str) -> None:
        """What comes beside tokens; then ring."""
        if index in outputs.cached_tokens and not opened.has_told:
            opened.cached_tokens = max(opened.cached_tokens, outputs.cached_tokens[index])
        if index in outputs.journeys:
            opened.record.lay(incarnation, outputs.journeys[index])
        opened.news.set()

    def _take_verdicts(self, incarnation: str, verdicts: Verdicts) -> None:
        columns = zip(
            verdicts.request_ids,
            verdicts.attempts,
            verdicts.kinds,
            verdicts.reasons,
            verdicts.num_bytes,
            verdicts.seconds,
            verdicts.exposed,
            strict=True,
        )
        for request_id, attempt, kind, reason, num_bytes, seconds, exposed in columns:
            # of an earlier attempt it is counted, and says nothing of the pair that has the request now
            current = self._inflight.on_verdict(request_id, attempt, incarnation, kind)
            self._handoffs.labels(result=kind).inc()
            if kind == "landed":
                self._moved.labels(direction="out").inc(num_bytes)
                self._seconds.observe(seconds)
                self._exposed.observe(exposed)
                if current:
                    moved = Transfer(num_bytes=num_bytes, seconds=seconds, exposed_s=exposed)
                    self._open[request_id].record.transfer = moved
            else:
                _log.info("handoff", request=request_id, result=kind, reason=reason)
                if kind == "lost" and current:
                    for tell in self.on_handoff_lost:
                        tell(incarnation, self._open[request_id].log.decode)


def _entry(up: GenerationsUp, index: int) -> Entry:
    outputs = up.outputs
    return Entry(
        attempt=outputs.attempts[index],
        incarnation=up.incarnation,
        choice=outputs.choices[index],
        position=outputs.positions[index],
        token_id=outputs.token_ids[index],
        finish_reason=outputs.finish_reasons[index],
        message=outputs.messages.get(index, ""),
        logprob=outputs.logprobs.get(index),
        prompt_logprobs=tuple(outputs.prompt_logprobs.get(index, ())),
    )


def _gives(log: RequestLog, incarnation: str) -> bool:
    """Whether this is the giver of a handoff: its one token needs its acknowledgement, no finish of its own follows."""
    return bool(log.decode) and incarnation == log.first
