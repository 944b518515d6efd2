"""The Backend of one instance: its own engine, for requests that come in by its own HTTP port.

Prefill and decode both happen here whatever the role; nothing is handed over, so no registry and no peer is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from xllm_py.base.clock import Clock
from xllm_py.base.errors import DeadlineExceeded, RequestError
from xllm_py.core.request import Submission
from xllm_py.instance.outlets import LocalOutlet, Outlets
from xllm_py.instance.replicas import Engine
from xllm_py.openai.backend import Delta, Readiness, ServedModel, Told

# the engine ends a request at its deadline itself; this much later the door stops waiting for it
_GRACE_S = 2.0


class LocalBackend:
    """Implements openai.backend.Backend."""

    def __init__(
        self,
        *,
        engine: Engine,
        outlets: Outlets,
        models: Callable[[], tuple[ServedModel, ...]],
        ready: Callable[[], Readiness],
        clock: Clock,
        on_journey: Callable[[Submission, str, dict[str, float]], None],
    ) -> None:
        self._engine = engine
        self._outlets = outlets
        self._models = models
        self._ready = ready
        self._clock = clock
        self._on_journey = on_journey

    async def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See Backend.generate; nothing is ever told here."""
        outlet = self._outlets.open_local(submission.request_id)
        state = "cancelled"
        num_going_on = submission.sampling.best_of
        try:
            self._engine.submit(submission)
            deadline = self._clock.now() + submission.timeout_s + _GRACE_S
            while num_going_on:
                for delta in await self._next(outlet, deadline):
                    num_going_on -= bool(delta.finish_reason)
                    state = "cancelled" if num_going_on else "finished"
                    yield delta
        except RequestError as error:
            state = error.code
            raise
        finally:
            self._outlets.close(submission.request_id)
            self._on_journey(submission, state, outlet.journey)
            if state != "finished":
                self._engine.abort([submission.request_id], [0])

    async def _next(self, outlet: LocalOutlet, deadline: float) -> list[Delta]:
        """Everything queued, at least one; raises the request's error once the queue is empty."""
        while not outlet.deltas:
            if outlet.error is not None:
                raise outlet.error
            outlet.news.clear()
            try:
                async with asyncio.timeout(deadline - self._clock.now()):
                    await outlet.news.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("the request's deadline passed") from error
        taken = _coalesce(list(outlet.deltas))
        outlet.deltas.clear()
        return taken

    async def recall(self, stream_id: str) -> Told | None:
        """An instance's own door has no other beside it."""
        return None

    def models(self) -> tuple[ServedModel, ...]:
        """One model under each of its served names."""
        return self._models()

    def ready(self) -> Readiness:
        """As the daemon sees it."""
        return self._ready()

    def explain(self, request_id: str) -> str:
        """There is one place only."""
        return ""


def _coalesce(deltas: list[Delta]) -> list[Delta]:
    """Join neighbours of one choice, so that a slow consumer gets fewer, larger pieces."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last is None or last.choice != delta.choice or last.finish_reason:
            joined.append(delta)
            continue
        joined[-1] = Delta(
            choice=last.choice,
            position=last.position,
            token_ids=last.token_ids + delta.token_ids,
            finish_reason=delta.finish_reason,
            cached_tokens=max(last.cached_tokens, delta.cached_tokens),
            logprobs=last.logprobs + delta.logprobs,
            prompt_logprobs=last.prompt_logprobs or delta.prompt_logprobs,
        )
    return joined
