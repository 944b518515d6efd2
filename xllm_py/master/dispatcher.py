"""Gets a request to instances, and to others when these fail: places it, submits it, and goes on where its log ends.

Made once; holds no request of its own. cluster/attempts decides what a failure means. Whatever an earlier attempt still does is ended by
Cancel, and what it still says is stale by its number. The log's tokens go along, so nothing is said twice and nothing computed twice
but KV.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass

from xllm_py.base import failpoints, hashing, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    DeadlineExceeded,
    InstanceLost,
    PeerUnavailable,
    RequestError,
    RequestQuarantined,
    XllmError,
    request_error,
)
from xllm_py.base.metrics import Children, Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.attempts import Attempts, Failure, GiveUp, Quarantine
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.routing import Route
from xllm_py.core.journey import Moment
from xllm_py.core.request import Receiver, Submission
from xllm_py.master.generations import Generations, OpenRequest
from xllm_py.master.journeys import Record
from xllm_py.master.peers import Peers
from xllm_py.master.router import Router
from xllm_py.master.waiting_room import WaitingRoom
from xllm_py.openai.backend import Told

_log = log.get(__name__)
_CANCEL_TRIES = 3
_CANCEL_WAIT_S = 0.2
_CLOSE_S = 1.0
NOTHING = Told()
_SLACK_S = 0.005  # a loop's timers may be early by their grain
_PACED_TOKENS = 16  # of an answer between two looks at its pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every request is given along, and how much is done for it."""

    address: str  # host:rpc_port that instances dial with their tokens
    relay: bool = False  # D's tokens come through P
    max_attempts: int = 3  # that may be lost
    queue_timeout_s: float = 60.0  # how long room is waited for
    max_queue_size: int = 1024  # requests held back


@dataclass(slots=True, kw_only=True)
class Run:
    """One request on its way through the cluster."""

    submission: Submission
    record: Record
    deadline: float
    attempts: Attempts
    told: Told = NOTHING  # its log begins with it
    opened: OpenRequest | None = None
    route: Route | None = None  # of the current attempt
    giver: str = ""  # the P of the attempt before
    numerics: str = ""  # what the tokens so far were computed with, when it was one thing
    failed_at: float | None = None  # an attempt was lost then, and no token has come since
    ahead: float = 0.0  # tokens to be computed before its first one, when it was placed
    decodes: bool = False  # its first token is there
    paced_at: float = 0.0  # when its pace was looked at last
    num_paced: int = 0  # tokens since then
    bell: asyncio.TimerHandle | None = None  # rings at the deadline, from the first attempt on


class Dispatcher:
    """One master's."""

    def __init__(
        self,
        *,
        router: Router,
        generations: Generations,
        peers: Peers,
        tasks: TaskFamily,
        clock: Clock,
        metrics: Metrics,
        terms: Terms,
    ) -> None:
        self._router = router
        self._generations = generations
        self._peers = peers
        self._tasks = tasks
        self._clock = clock
        self._terms = terms
        self._quarantine = Quarantine()
        self._room = WaitingRoom(
            most_waiting=terms.max_queue_size,
            patience_s=terms.queue_timeout_s,
            soonest_s=router.soonest_s,
            tasks=tasks,
            clock=clock,
            metrics=metrics,
        )
        self._cancels: set[asyncio.Task[None]] = set()
        attempts = metrics.counter("attempts", "Attempts by what caused them", ["cause"])
        self._attempts = Children(lambda cause: attempts.labels(cause).inc)
        self._stalls = metrics.seconds(
            "failover_seconds", "From the loss of an attempt to the next token"
        )

    def begin(
        self, submission: Submission, record: Record, received: float, told: Told = NOTHING
    ) -> Run:
        """A request comes in. told: what the client has of it already. Raises RequestQuarantined."""
        # hardly ever is anything in it, and a fingerprint is of the whole prompt
        if self._quarantine and self._quarantine.refuses(_fingerprint(submission), received):
            raise RequestQuarantined(
                "two instances died while they computed a request like this one; it is refused for some minutes"
            )
        return Run(
            submission=submission,
            record=record,
            deadline=received + submission.timeout_s,
            attempts=Attempts(
                most=self._terms.max_attempts, patience_s=self._terms.queue_timeout_s
            ),
            told=told,
            numerics=told.numerics,
        )

    def counts(self) -> dict[str, int]:
        """For the ledger: 0 when idle, save for the streams of instances."""
        generations = self._generations
        return {
            **generations.ledger(),
            "queued": len(self._room),
            "instance_streams": generations.num_streams,
        }

    # ---- one attempt, and the next ----

    async def start(self, run: Run) -> OpenRequest:
        """When it is its turn, until an instance has it. Raises the RequestError that the client is to see."""
        await self._room.pass_through(run.submission, run.deadline)
        return await self.dispatch(run)

    async def dispatch(self, run: Run, cause: str = "new") -> OpenRequest:
        """As `start`, without waiting for a turn."""
        while True:
            try:
                opened = self._place(run)
                self._attempts[cause]()
                await self._submit(run, opened)
            except RequestError as error:
                cause = error.code
                await self._prepare(run, error)
            else:
                return opened

    async def go_on(self, run: Run, opened: OpenRequest) -> None:
        """The attempt ended with an error: make another one, or raise what the client is to see."""
        assert opened.log.error is not None
        error = request_error(*opened.log.error)
        if run.failed_at is None:
            run.failed_at = self._clock.now()
        await self._prepare(run, error)
        await self.dispatch(run, cause=error.code)

    def on_news(self, run: Run, num_tokens: int) -> None:
        """Tokens came: the attempt is a good one."""
        now = self._clock.now()
        if run.decodes:
            self._pace(run, num_tokens, now)
            return
        run.attempts.on_taken()
        if run.failed_at is not None:
            self._stalls.observe(now - run.failed_at)
            run.failed_at = None
        if run.route is not None:
            run.numerics = run.numerics or _numerics(run.route)
            seconds = now - run.record.submitted_at
            self._router.on_first_token(run.submission.request_id, run.route, run.ahead, seconds)
            run.decodes, run.paced_at, run.num_paced = True, now, 0

    def _pace(self, run: Run, num_tokens: int, now: float) -> None:
        """Once in a while tell the router how fast answers grow there."""
        run.num_paced += num_tokens
        if run.num_paced >= _PACED_TOKENS and run.route is not None:
            self._router.on_pace(run.route, (now - run.paced_at) / run.num_paced)
            run.paced_at, run.num_paced = now, 0

    def _failure(self, run: Run, error: RequestError) -> Failure:
        """What is known of the attempt that failed with this."""
        entry = run.opened.log if run.opened is not None else None
        if run.route is None:
            return Failure(error.code, error.message)  # it found no place
        if entry is None or entry.error is None:
            first = frozenset({run.route.first.incarnation_id})
            return Failure(error.code, error.message, first)
        if entry.died and entry.computing in entry.at_fault:
            spoke = entry.computing in entry.spoke
            run.attempts.on_death(self._clock.now(), spoke=spoke)
        return Failure(error.code, error.message, entry.at_fault)

    async def _prepare(self, run: Run, error: RequestError) -> None:
        """Let go of the attempt that failed, and wait for as long as the next one has to. Raises when there is to be none."""
        now = self._clock.now()
        failure = self._failure(run, error)
        self._let_go(run, failure.code)
        number = run.attempts.number
        verdict = run.attempts.on_failed(failure, now)
        if isinstance(verdict, GiveUp):
            if run.attempts.deadly:
                self._quarantine.add(_fingerprint(run.submission), now)
                _log.error("request quarantined", request=run.submission.request_id)
            if verdict.code == error.code:
                raise error
            raise request_error(verdict.code, verdict.message)
        say = _log.debug if verdict.pause_s else _log.info
        say(
            "attempt failed",
            request=run.submission.request_id,
            attempt=number,
            reason=failure.code,
            pause_s=verdict.pause_s,
        )
        if verdict.pause_s:
            await asyncio.sleep(min(verdict.pause_s, _left(run.deadline, now)))
        _left(run.deadline, self._clock.now())

    def _place(self, run: Run) -> OpenRequest:
        """Choose instances and open the log, or go on with it. Raises as Router.place."""
        run.route = None
        attempts = run.attempts
        said = run.opened.log.generated_ids if run.opened is not None else run.told.ids
        submission = run.submission
        if said or attempts.number != submission.attempt:
            submission = dataclasses.replace(
                submission, attempt=attempts.number, generated_ids=said
            )
        route = run.route = self._router.place(
            submission,
            passed_over=attempts.passed_over,
            numerics=run.numerics,
            giver=run.giver,
        )
        run.giver = route.first.incarnation_id if route.decode is not None else ""
        run.ahead = self._router.on_placed(submission.request_id, route)
        run.decodes = False
        run.record.route, run.record.attempt = route, attempts.number
        run.record.stamp(Moment.PLACED, self._clock.now())
        if run.opened is None:
            run.opened = self._generations.open(submission, attempts.number, route, run.record)
            left_s = run.deadline - self._clock.now()
            ring = run.opened.news.set  # whoever waits for news looks at the time then
            run.bell = asyncio.get_running_loop().call_later(left_s + _SLACK_S, ring)
            return run.opened
        self._generations.again(run.opened, attempts.number, route)
        return run.opened

    async def _submit(self, run: Run, opened: OpenRequest) -> None:
        """Hand it to P (or to the one instance that does everything). Raises P's refusal, or InstanceLost."""
        route, now = run.route, self._clock.now()
        assert route is not None
        run.record.submitted_at, run.record.state = now, "running"
        order = dataclasses.replace(
            run.submission,
            attempt=run.attempts.number,
            generated_ids=opened.log.generated_ids,
            timeout_s=_left(run.deadline, now),
            receiver=_receiver(route.decode),
            master=self._terms.address,
            relay=self._terms.relay and route.decode is not None,
        )
        failpoints.hit("m.submit.pre")
        calling = self._peers.submit(route.first, order)
        calling.add_done_callback(lambda _: opened.news.set())
        try:
            while not calling.done():
                opened.news.clear()
                if opened.log.error is not None:  # lost before the call returned
                    raise request_error(*opened.log.error)
                # whoever has it speaks: the answer to the call tells nothing more. What an attempt before said may be unread still
                if opened.log.spoke or opened.log.done:
                    return
                _left(run.deadline, self._clock.now())
                await opened.news.wait()
        finally:
            calling.cancel()
        refusal = calling.result()
        if isinstance(refusal, PeerUnavailable):
            _log.warning(
                "submit failed",
                request=order.request_id,
                instance=route.first.name,
                reason=refusal.message,
            )
            raise InstanceLost("the instance chosen for the request does not answer")
        if refusal is not None:
            raise refusal
        failpoints.hit("m.submit.post")

    # ---- the end of attempts ----

    def close(self, run: Run, *, finished: bool) -> None:
        """Forget the request; when it did not finish by itself, end it wherever it may still run."""
        if run.bell is not None:
            run.bell.cancel()
        if run.opened is not None:
            self._generations.close(run.submission.request_id)
        if not finished:
            self._let_go(run, run.record.state)
        elif run.route is not None:
            self._router.on_gone(run.submission.request_id, run.route, decoding=run.decodes)

    def _let_go(self, run: Run, reason: str) -> None:
        """Whoever has the current attempt is to drop it."""
        route, run.route = run.route, None
        if route is None:
            return
        self._router.on_gone(run.submission.request_id, route, decoding=run.decodes)
        run.decodes = False
        for card in (route.first, route.decode):
            if card is not None:
                work = self._cancel(card, run.submission.request_id, run.attempts.number, reason)
                task = self._tasks.start(
                    work, name=f"cancel {run.submission.request_id} at {card.name}"
                )
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)

    async def finish_cancels(self) -> None:
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


def _fingerprint(submission: Submission) -> bytes:
    """Of what is computed: the prompt and how it is answered, whoever asks."""
    return hashing.prompt_digest(submission.prompt_ids)


def _numerics(route: Route) -> str:
    """Of both instances; empty when they differ, and then no other could go on exactly."""
    mine = route.first.numerics_fingerprint
    return mine if route.decode is None or route.decode.numerics_fingerprint == mine else ""


def _left(deadline: float, now: float) -> float:
    if now >= deadline:
        raise late()
    return deadline - now


def late() -> RequestError:
    """The error of a request whose time is over."""
    return DeadlineExceeded("the request's deadline passed before its answer was complete")


def _receiver(card: Card | None) -> Receiver | None:
    if card is None:
        return None
    return Receiver(name=card.name, address=card.rpc_address, incarnation=card.incarnation_id)
