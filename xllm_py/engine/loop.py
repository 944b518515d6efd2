"""The engine loop: commands in, plan, execute, outputs out. Plain synchronous Python, one thread.

    take commands -> take transport events -> schedule -> execute (KV leaves layer by layer) -> apply -> send outputs

With overlap (--enable_schedule_overlap), the step after a step of decodes is planned and begun while that one is computed, where nothing but
its tokens could change it (Scheduler.schedule_ahead).

Called by engine/__main__. It decides nothing: the scheduler decides what to compute, the handoff agent what to send. While a step
is computed, only answers to our offers are obeyed, between two layers, because their KV can leave at once; all other commands wait
for the step's end. When there is nothing to compute it sleeps in select until a command, a transport event or the next deadline.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from xllm_py.base import failpoints, ids, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    IllegalTransition,
    PeerUnavailable,
    RequestError,
    StartError,
)
from xllm_py.core.executor import Executor, Finish
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.core.prefix_cache import COUNTS as PREFIX_COUNTS
from xllm_py.core.request import Submission
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.transport.pipe import EnginePipe
from xllm_py.wire import messages as m

_IDLE_S = 1.0  # the longest sleep; also how often an idle engine says that it lives
_STUCK_S = (
    0.02  # all that wait lack blocks: news frees them, and this is for news that made no sound
)
_PROGRESS_S = 0.05  # progress is not told more often than this while steps are short

_log = log.get(__name__)


class EngineLoop:
    """Runs until the pipe ends (PeerUnavailable) or the executor breaks (StartError)."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: Executor,
        agent: HandoffAgent,
        pipe: EnginePipe,
        clock: Clock,
        overlaps: bool = False,
    ) -> None:
        self._overlaps = overlaps
        self._under_way: list[tuple[StepPlan, Finish]] = []  # begun, and not taken in
        self._scheduler = scheduler
        self._executor = executor
        self._agent = agent
        self._pipe = pipe
        self._clock = clock
        self._steps = 0
        self._tokens = 0
        self._step_s = 0.0
        self._s_per_token = 0.001  # of compute, learnt; announces how long a step may take
        self._told_at = 0.0
        self._stuck = False
        self._postponed: list[m.Command] = []  # came while a step was computed
        self._readers: list[Any] = [pipe, *agent.wake_fds]
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            m.Submit: self._on_submit,
            m.Abort: self._on_abort,
            m.Offers: agent.on_offers,
            m.Answers: agent.giving.on_answers,
            m.FirstTokens: agent.taking.on_first_tokens,
            m.FirstTaken: agent.giving.on_first_taken,
            m.PeerGone: agent.on_peer_gone,
            m.Inspect: self._on_inspect,
            m.Drain: self._on_drain,
            m.FlushCache: self._on_flush,
            m.Probe: agent.probing.on_probe,
        }

    def run(self) -> None:
        """Loop for ever."""
        while True:
            self.turn(self._sleep_s())

    def turn(self, timeout_s: float) -> None:
        """One round: wait at most `timeout_s` for news, then at most one step."""
        commands, self._postponed = self._postponed, []
        readable, _, _ = select.select(self._readers, [], [], 0.0 if commands else timeout_s)
        if self._pipe in readable:
            commands += self._pipe.receive()
        for command in commands:
            self._obey(command)
        now = self._clock.now()
        self._agent.on_news(now)
        plan = self._next_plan(now)
        self._stuck = plan.empty
        if not plan.empty:
            self._step(plan)
        self._agent.ended(self._clock.now())
        self._tell_outputs()  # before what handoffs take: somebody waits for a first token
        self._agent.after_step(self._clock.now())
        self._tell_outputs()
        self._tell_progress(force=plan.empty or not self._scheduler.has_work())

    def _tell_outputs(self) -> None:
        outputs = self._scheduler.take_outputs()
        if outputs.request_ids:
            self._pipe.send(m.Stepped(outputs=outputs))

    def _next_plan(self, now: float) -> StepPlan:
        """Of the step whose result is taken in next; it may be under way."""
        if self._under_way:
            return self._under_way[0][0]
        plan = self._scheduler.schedule(now)
        self._agent.before_step(plan, now)
        return plan

    def _computed(self, plan: StepPlan) -> StepResult:
        """Begin on it, and on the one behind it, where they are not begun yet; its result."""
        if not self._overlaps:
            return self._executor.execute(plan, self._layer_done)
        if not self._under_way:
            self._under_way.append((plan, self._executor.begin(plan, self._layer_done)))
        ahead = self._scheduler.schedule_ahead(self._clock.now())
        if ahead is not None:
            self._under_way.append((ahead, self._executor.begin(ahead)))
        _, finish = self._under_way.pop(0)
        return finish()

    def _step(self, plan: StepPlan) -> None:
        started = self._clock.now()
        num_tokens = sum(plan.num_tokens)
        estimate = self._s_per_token * num_tokens
        if estimate > _PROGRESS_S:
            self._tell_progress(announced_s=estimate, force=True)
        if plan.rows:
            failpoints.hit(
                "d.step" if max(plan.num_tokens) == 1 else "p.prefill.chunk", plan.token_ids
            )
        try:
            result = self._computed(plan)
        except PeerUnavailable:
            raise  # the pipe ended in mid-step
        except Exception as error:
            # one of the four edges: whatever the model raised, it concerns a request until it has shown that it does not
            self._under_way.clear()
            if not self._survives(plan, error):
                raise StartError(f"the executor failed in step {plan.step}: {error}") from error
            return
        now = self._clock.now()
        self._scheduler.apply(plan, result, now)
        self._step_s = now - started
        self._s_per_token = max(self._s_per_token * 0.9, self._step_s / max(1, num_tokens))
        self._steps += 1
        self._tokens += len(result.token_ids)

    def _survives(self, plan: StepPlan, error: Exception) -> bool:
        error_id = ids.request_id("err")
        kind = type(error).__name__
        alone = plan.started[0].request_id if len(plan.rows) == 1 and plan.started else ""
        _log.error(
            "step failed",
            step=plan.step,
            error_id=error_id,
            requests=len(plan.rows),
            request=alone,
            exc_info=error,
        )
        message = (
            f"the model failed on this request with {kind}; change the request, or report "
            f"{error_id}, under which the instance's log has the cause"
        )
        self._agent.giving.on_crash()
        return self._scheduler.on_crash(plan, message, self._clock.now())

    def _layer_done(self, layer: int) -> None:
        """In mid-step: push what this layer completed, and look for answers to offers."""
        self._agent.layer_done(layer)
        if not self._agent.giving.awaits_answer:
            return
        while select.select([self._pipe], [], [], 0.0)[0]:
            for command in self._pipe.receive():
                if isinstance(command, m.Answers):
                    self._obey(command)
                else:
                    self._postponed.append(command)

    def _sleep_s(self) -> float:
        if self._under_way or self._scheduler.has_work():
            return _STUCK_S if self._stuck else 0.0
        now = self._clock.now()
        moments = [self._scheduler.next_deadline(), self._agent.next_tick()]
        nearest = min((at - now for at in moments if at is not None), default=_IDLE_S)
        return min(max(nearest, 0.0), _IDLE_S)

    def _obey(self, command: m.Command) -> None:
        handler = self._handlers.get(type(command))
        if handler is None:
            raise IllegalTransition("engine", "running", type(command).__name__)
        handler(command, self._clock.now())

    def _on_submit(self, command: m.Submit, now: float) -> None:
        for submission in command.submissions:
            self._add(submission, now)

    def _on_abort(self, command: m.Abort, now: float) -> None:
        for request_id, attempt in zip(command.request_ids, command.attempts, strict=True):
            self._scheduler.abort(request_id, attempt, now)

    def _on_flush(self, command: m.FlushCache, now: float) -> None:
        freed = self._scheduler.flush_cache()
        _log.info("prefix cache flushed", freed_blocks=freed)
        self._tell_ledger(command.call)

    def _on_inspect(self, command: m.Inspect, now: float) -> None:
        self._tell_ledger(command.call)

    def _tell_ledger(self, call: int) -> None:
        counts = {**self._scheduler.ledger(), **self._agent.ledger()}
        self._pipe.send(m.Ledger(call=call, counts=counts))

    def _on_drain(self, command: m.Drain, now: float) -> None:
        self._scheduler.begin_drain()

    def _add(self, submission: Submission, now: float) -> None:
        """A refusal goes back as an output, on the road a token takes."""
        try:
            self._scheduler.add(submission, now)
        except RequestError as error:
            self._scheduler.refuse(submission, error)

    def _tell_progress(self, *, announced_s: float = 0.0, force: bool = False) -> None:
        now = self._clock.now()
        if not force and now - self._told_at < _PROGRESS_S:
            return
        self._told_at = now
        counts = self._scheduler.ledger()
        cached, evicted = self._scheduler.take_cache_changes()
        self._pipe.send(
            m.Progress(
                steps=self._steps,
                tokens=self._tokens,
                step_s=self._step_s,
                announced_s=announced_s,
                waiting=counts["requests_waiting"],
                running=counts["requests_running"],
                blocks={
                    name: counts[name]
                    for name in ("total", "free", "active", "cached", "staged", "quarantined")
                },
                prefix={name: counts[name] for name in PREFIX_COUNTS},
                cached=cached,
                evicted=evicted,
            )
        )
