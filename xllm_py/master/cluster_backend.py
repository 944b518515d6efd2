"""The Backend of a whole cluster: places a request, submits it to P with D as receiver, reads its tokens from the log.

Whatever ends the reading early (the client left, a stop string, the deadline, an error) ends the request at P and D at once by
Cancel. Nothing is tried a second time: a lost instance is 503 instance_lost, never a hang.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    DeadlineExceeded,
    InstanceLost,
    PeerUnavailable,
    RequestError,
    XllmError,
    request_error,
)
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.routing import Route
from xllm_py.core.journey import Moment
from xllm_py.core.request import Receiver, Submission
from xllm_py.master.generations import Generations, OpenRequest
from xllm_py.master.journeys import Journeys, Record
from xllm_py.master.peers import Peers
from xllm_py.master.router import Router
from xllm_py.openai.backend import Delta, Readiness, ServedModel

_log = log.get(__name__)
_CANCEL_TRIES = 3
_CANCEL_WAIT_S = 0.2
_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerWay:
    """How tokens come back: the host:rpc_port that instances dial, and whether D's tokens come through P."""

    address: str
    relay: bool = False


class ClusterBackend:
    """Implements openai.backend.Backend."""

    def __init__(
        self,
        *,
        router: Router,
        generations: Generations,
        peers: Peers,
        journeys: Journeys,
        tasks: TaskFamily,
        clock: Clock,
        way: AnswerWay,
    ) -> None:
        self._router = router
        self._generations = generations
        self._peers = peers
        self._journeys = journeys
        self._tasks = tasks
        self._clock = clock
        self._way = way
        self._cancels: set[asyncio.Task[None]] = set()

    # ---- Backend ----

    async def generate(self, submission: Submission) -> AsyncGenerator[Delta, None]:
        """See Backend.generate."""
        received = self._clock.now()
        record = self._journeys.open(submission.request_id, received)
        deadline = received + submission.timeout_s
        try:
            route = record.route = self._router.place(submission)
            record.stamp(Moment.PLACED, self._clock.now())
            opened = self._generations.open(submission, route, record)
        except RequestError as error:
            record.state = error.code
            raise
        num_going_on = submission.sampling.best_of
        try:
            await self._submit(submission, route, record, deadline)
            while num_going_on:
                for delta in await self._next(opened, deadline):
                    num_going_on -= bool(delta.finish_reason)
                    yield delta
        except RequestError as error:
            record.state = error.code
            raise
        finally:
            self._close(opened, route, finished=not num_going_on)

    def models(self) -> tuple[ServedModel, ...]:
        """Every name that routable instances serve, with the limits all of them keep."""
        models: dict[str, ServedModel] = {}
        for card in self._router.cards():
            for name in card.served_names:
                models[name] = _narrowed(models.get(name), name, card)
        return tuple(models[name] for name in sorted(models))

    def ready(self) -> Readiness:
        """As the router sees it."""
        return self._router.ready()

    # ---- one request ----

    async def _submit(
        self, submission: Submission, route: Route, record: Record, deadline: float
    ) -> None:
        """Hand it to P (or to the one instance that does everything). Raises P's refusal, or InstanceLost."""
        record.submitted_at = self._clock.now()
        order = dataclasses.replace(
            submission,
            timeout_s=_left(deadline, record.submitted_at),
            receiver=_receiver(route.decode),
            master=self._way.address,
            relay=self._way.relay and route.decode is not None,
        )
        record.state = "running"
        try:
            async with asyncio.timeout(order.timeout_s):
                await self._peers.of(route.first).submit(order)
        except TimeoutError as error:
            raise _late() from error
        except PeerUnavailable as error:
            _log.warning(
                "submit failed",
                request=submission.request_id,
                instance=route.first.name,
                reason=error.message,
            )
            raise InstanceLost(
                "the instance chosen for the request does not answer; send it again"
            ) from error

    async def _next(self, opened: OpenRequest, deadline: float) -> list[Delta]:
        """At least one delta; raises the request's error once all before it was read."""
        while True:
            news = opened.log.read()
            if news:
                return [
                    Delta(
                        choice=each.choice,
                        position=each.position,
                        token_ids=each.token_ids,
                        finish_reason=each.finish_reason,
                        cached_tokens=opened.cached_tokens,
                        logprobs=each.logprobs,
                        prompt_logprobs=each.prompt_logprobs,
                    )
                    for each in news
                ]
            if opened.log.error is not None:
                raise request_error(*opened.log.error)
            opened.news.clear()
            try:
                async with asyncio.timeout(_left(deadline, self._clock.now())):
                    await opened.news.wait()
            except TimeoutError as error:
                raise _late() from error

    def _close(self, opened: OpenRequest, route: Route, *, finished: bool) -> None:
        """Forget the request; when it did not finish by itself, end it wherever it may still run."""
        entry, record = opened.log, opened.record
        record.stamp(Moment.FINISHED, self._clock.now())
        if record.state == "running":
            record.state = "finished" if finished else "cancelled"
        self._generations.close(entry.request_id)
        if finished:
            return
        for card in (route.first, route.decode):
            if card is not None:
                task = self._tasks.start(
                    self._cancel(card, entry.request_id, entry.attempt, record.state),
                    name=f"cancel {entry.request_id} at {card.name}",
                )
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)

    async def close(self) -> None:
        """Let the cancels of the last requests arrive, for a moment."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=_CLOSE_S)

    async def _cancel(self, card: Card, request_id: str, attempt: int, reason: str) -> None:
        """Tell one instance, a few times when it does not hear; after that the request's own deadline ends it there."""
        for turn in range(_CANCEL_TRIES):
            if not self._router.knows(card):
                return  # that life is over; to dial it would keep a client of it for ever
            try:
                await self._peers.of(card).cancel([request_id], [attempt], reason)
            except XllmError as error:
                _log.debug("cancel failed", instance=card.name, turn=turn, reason=error.message)
                await asyncio.sleep(_CANCEL_WAIT_S * 2**turn)
            else:
                return


def _left(deadline: float, now: float) -> float:
    if now >= deadline:
        raise _late()
    return deadline - now


def _late() -> RequestError:
    return DeadlineExceeded("the request's deadline passed before its answer was complete")


def _receiver(card: Card | None) -> Receiver | None:
    if card is None:
        return None
    return Receiver(name=card.name, address=card.rpc_address, incarnation=card.incarnation_id)


def _narrowed(known: ServedModel | None, name: str, card: Card) -> ServedModel:
    """The model with the smallest limits of all instances that serve it."""
    mine = ServedModel(
        name=name,
        max_model_len=card.max_model_len,
        vocab_size=card.vocab_size,
        created=card.register_ts_ms // 1000,
        fingerprint=f"fp_{card.model_fingerprint[:12]}",
        sampling_defaults=card.sampling_defaults,
    )
    if known is None:
        return mine
    return dataclasses.replace(
        known,
        max_model_len=min(known.max_model_len, mine.max_model_len),
        vocab_size=min(known.vocab_size, mine.vocab_size),
        created=min(known.created, mine.created),
    )
