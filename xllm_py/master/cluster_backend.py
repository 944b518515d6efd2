"""The Backend of a whole cluster: has requests dispatched, and reads their tokens from the log.

Whatever ends the reading early (the client left, a stop string, the deadline, an error) ends the request at P and D at once by
Cancel. An attempt that fails is followed by another one that goes on where the log ends, so the reader notices nothing but time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable

from xllm_py.base.clock import Clock
from xllm_py.base.errors import RequestError
from xllm_py.cluster.instance_info import Card
from xllm_py.core.journey import Moment
from xllm_py.core.request import Submission
from xllm_py.master.dispatcher import Dispatcher, Run, late
from xllm_py.master.generations import OpenRequest
from xllm_py.master.journeys import Journeys
from xllm_py.master.router import Router
from xllm_py.openai.backend import Delta, Readiness, ServedModel, Told


class ClusterBackend:
    """Implements openai.backend.Backend."""

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        journeys: Journeys,
        recall: Callable[[str], Awaitable[Told | None]],
        clock: Clock,
    ) -> None:
        """recall: asks the instances what they have said of a request by the id of its stream."""
        self._router = router
        self._recall = recall
        self._dispatcher = dispatcher
        self._journeys = journeys
        self._clock = clock
        self._cards: tuple[Card, ...] = ()  # as the router said last
        self._models: tuple[ServedModel, ...] = ()  # what they serve

    # ---- Backend ----

    async def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See Backend.generate."""
        received = self._clock.now()
        record = self._journeys.open(submission.request_id, received, submission.trace)
        num_going_on = submission.sampling.best_of
        run = None
        try:
            run = self._dispatcher.begin(submission, record, received, told or Told())
            if run.told.ids:
                yield Delta(position=0, token_ids=run.told.ids)
            opened = await self._dispatcher.start(run)
            while num_going_on:
                for delta in await self._next(run, opened):
                    num_going_on -= bool(delta.finish_reason)
                    yield delta
        except RequestError as error:
            record.state = error.code
            raise
        finally:
            record.stamp(Moment.FINISHED, self._clock.now())
            if record.state in ("received", "running"):
                record.state = "cancelled" if num_going_on else "finished"
            if run is not None:
                self._dispatcher.close(run, finished=not num_going_on)

    async def recall(self, stream_id: str) -> Told | None:
        """See Backend."""
        return await self._recall(stream_id)

    def models(self) -> tuple[ServedModel, ...]:
        """Every name that routable instances serve, with the limits all of them keep."""
        cards = self._router.cards()
        if cards is not self._cards:
            models: dict[str, ServedModel] = {}
            for card in cards:
                for name in card.served_names:
                    models[name] = _narrowed(models.get(name), name, card)
            self._cards = cards
            self._models = tuple(models[name] for name in sorted(models))
        return self._models

    def ready(self) -> Readiness:
        """As the router sees it."""
        return self._router.ready()

    def explain(self, request_id: str) -> str:
        """Names and the policy's reason, of the attempt that runs."""
        record = self._journeys.get(request_id)
        if record is None or record.route is None:
            return ""
        route = record.route
        names = route.first.name + (f" -> {route.decode.name}" if route.decode else "")
        return f"attempt {record.attempt}: {names} ({route.reason})"

    # ---- one request ----

    async def _next(self, run: Run, opened: OpenRequest) -> list[Delta]:
        """At least one delta, from whichever attempt; raises the request's error once all before it was read."""
        while True:
            news = opened.log.read()
            if news:
                self._dispatcher.on_news(run, sum(len(each.token_ids) for each in news))
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
                await self._dispatcher.go_on(run, opened)
                continue
            opened.news.clear()
            if self._clock.now() >= run.deadline:
                raise late()
            await opened.news.wait()  # the dispatcher rings at the deadline too

    async def close(self) -> None:
        """Let the cancels of the last requests arrive, for a moment."""
        await self._dispatcher.finish_cancels()


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
