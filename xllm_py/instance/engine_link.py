"""The API process's view of its engine: starts it by exec, speaks to it, hears when it ends.

One EngineLink per daemon. Commands are plain method calls; questions (offers, first tokens, ledger) are awaited with a
deadline; everything the engine says unasked goes to the handlers given at construction. It knows nothing of HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    DeadlineExceeded,
    EngineDied,
    EngineDown,
    PeerUnavailable,
    RequestError,
    StartError,
)
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.config import EngineConfig
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.transport.pipe import ApiPipe
from xllm_py.wire import messages as m

_log = log.get(__name__)
_STOP_TIMEOUT_S = 5.0
Key = TypeVar("Key")
Answer = TypeVar("Answer")
Waiting: TypeAlias = dict[Key, list[asyncio.Future[Answer]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHandlers:
    """Who hears what the engine says unasked. All are called on the event loop and must return at once."""

    on_outputs: Callable[[Outputs], None]
    on_offers: Callable[[list[Offer]], None]
    on_first_tokens: Callable[[m.FirstTokensOut], None]
    on_cancels: Callable[[m.CancelsOut], None]
    on_verdicts: Callable[[m.Verdicts], None]
    on_reservations_ended: Callable[[m.ReservationsEnded], None]
    on_progress: Callable[[m.Progress], None]

    @classmethod
    def of_none(cls, hear: Callable[[Any], None]) -> EngineHandlers:
        """Of an engine that serves nobody; hear: gets whatever it says."""
        return cls(
            on_outputs=hear,
            on_offers=hear,
            on_first_tokens=hear,
            on_cancels=hear,
            on_verdicts=hear,
            on_reservations_ended=hear,
            on_progress=hear,
        )


class EngineLink:
    """One engine process and its pipe."""

    def __init__(self, *, handlers: EngineHandlers, tasks: TaskFamily, clock: Clock) -> None:
        self._on: dict[type, Callable[[Any], None]] = {
            m.Stepped: lambda event: handlers.on_outputs(event.outputs),
            m.OffersOut: lambda event: handlers.on_offers(event.offers),
            m.FirstTokensOut: handlers.on_first_tokens,
            m.CancelsOut: handlers.on_cancels,
            m.Verdicts: handlers.on_verdicts,
            m.ReservationsEnded: handlers.on_reservations_ended,
            m.Progress: self._on_progress,
            m.Answers: self._on_answers,
            m.FirstTaken: self._on_taken,
            m.Ledger: self._on_ledger,
            m.Probed: self._on_probed,
            m.Failed: self._on_failed,
        }
        self._hear_progress = handlers.on_progress
        self._tasks = tasks
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._opened: ApiPipe | None = None
        self._pipe: ApiPipe | None = (
            None  # once the engine is ready: before, it hears nothing but its configuration
        )
        self._answers: Waiting[tuple[str, int], OfferAnswer] = {}
        self._taken: Waiting[tuple[str, int], bool] = {}
        self._ledgers: Waiting[int, dict[str, int]] = {}
        self._probes: Waiting[int, m.Probed] = {}
        self._calls = 0
        self._closing = False
        self.progress = m.Progress()
        self.progress_at = 0.0
        self.down = ""  # why the engine is down; empty while it is up

    async def start(self, config: EngineConfig, *, timeout_s: float) -> m.Ready:
        """Exec the engine and wait until it can serve. Raises the StartError leaf the engine died of."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "xllm_py.engine", "--fd", str(theirs.fileno())]
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
        # Popen and not asyncio's: the engine must be the child of the main thread, which PR_SET_PDEATHSIG watches
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)  # noqa: ASYNC220
        theirs.close()
        pipe = self._opened = await ApiPipe.open(ours)
        pipe.send(m.Start(config=config))
        try:
            event = (await asyncio.wait_for(pipe.receive(), timeout_s))[0]
        except PeerUnavailable as error:
            raise EngineDied(
                "the engine process ended while it started; its last words stand above"
            ) from error
        except TimeoutError as error:
            raise EngineDied(f"the engine was not ready after {timeout_s:.0f} s") from error
        if isinstance(event, m.Failed):
            raise _start_error(event)
        if not isinstance(event, m.Ready):
            raise EngineDied(f"the engine began with {type(event).__name__} instead of Ready")
        self.progress_at = self._clock.now()
        self._pipe = pipe
        self._tasks.start(self._listen(pipe), name="engine-events", vital=True)
        return event

    async def _listen(self, pipe: ApiPipe) -> None:
        try:
            while True:
                for event in await pipe.receive():
                    self._on_event(event)
        except PeerUnavailable as error:
            if self._closing:
                return
            self.down = self.down or error.message
            self._fail_waiters()
            raise EngineDied(f"the engine process died: {self.down}") from error

    def _on_event(self, event: m.Event) -> None:
        handler = self._on.get(type(event))
        if handler is None:
            _log.warning("unexpected word from the engine", kind=type(event).__name__)
            return
        handler(event)

    def _on_progress(self, event: m.Progress) -> None:
        self.progress, self.progress_at = event, self._clock.now()
        self._hear_progress(event)

    def _on_answers(self, event: m.Answers) -> None:
        for answer in event.answers:
            _resolve(self._answers, (answer.request_id, answer.attempt), answer)

    def _on_taken(self, event: m.FirstTaken) -> None:
        entries = zip(event.request_ids, event.attempts, event.accepted, strict=True)
        for request_id, attempt, accepted in entries:
            _resolve(self._taken, (request_id, attempt), accepted)

    def _on_ledger(self, event: m.Ledger) -> None:
        _resolve(self._ledgers, event.call, event.counts)

    def _on_probed(self, event: m.Probed) -> None:
        _resolve(self._probes, event.call, event)

    def _on_failed(self, event: m.Failed) -> None:
        self.down = event.message

    def _fail_waiters(self) -> None:
        waiting: list[list[asyncio.Future[Any]]] = []
        waiting += [*self._answers.values(), *self._taken.values()]
        waiting += [*self._ledgers.values(), *self._probes.values()]
        for future in itertools.chain.from_iterable(waiting):
            if not future.done():
                future.set_exception(_down())

    def _send(self, command: m.Command) -> None:
        if self._pipe is None or self.down:
            raise _down()
        try:
            self._pipe.send(command)
        except PeerUnavailable as error:  # a write found its end before `_listen` did
            raise _down() from error

    def _tell(self, command: m.Command) -> None:
        """Nothing is lost when the engine is down: what this is about ended with it."""
        with contextlib.suppress(EngineDown):
            self._send(command)

    def submit(self, submission: Submission) -> None:
        """Hand a request to the engine; refusals come back as outputs. Raises EngineDown."""
        self._send(m.Submit(submissions=[submission]))

    def abort(self, request_ids: list[str], attempts: list[int]) -> None:
        """End requests; harmless when they are unknown or the engine is down."""
        if request_ids:
            self._tell(m.Abort(request_ids=request_ids, attempts=attempts))

    def answer_offers(self, answers: list[OfferAnswer]) -> None:
        """P: what D said to our offers."""
        self._tell(m.Answers(answers=answers))

    def first_taken(self, taken: m.FirstTaken) -> None:
        """P: what D said to our first tokens."""
        self._tell(taken)

    def peer_gone(self, incarnation: str) -> None:
        """D: end the reservations of a giver."""
        self._tell(m.PeerGone(incarnation=incarnation))

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._tell(m.Drain())

    async def offer(self, offers: list[Offer], *, timeout_s: float) -> list[OfferAnswer]:
        """D: put a giver's offers before our scheduler. Raises EngineDown or DeadlineExceeded."""
        keys = [(offer.submission.request_id, offer.submission.attempt) for offer in offers]
        return await self._ask(self._answers, keys, m.Offers(offers=offers), timeout_s)

    async def first_tokens(self, firsts: list[FirstToken], *, timeout_s: float) -> list[bool]:
        """D: pass first tokens on; False where the grant is not known."""
        keys = [(first.request_id, first.attempt) for first in firsts]
        return await self._ask(self._taken, keys, m.FirstTokens(firsts=firsts), timeout_s)

    async def ledger(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """The engine's counts."""
        self._calls += 1
        call = self._calls
        return (await self._ask(self._ledgers, [call], m.Inspect(call=call), timeout_s))[0]

    async def flush_cache(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """Forget the cached prefixes that nobody uses; the engine's counts afterwards."""
        self._calls += 1
        call = self._calls
        return (await self._ask(self._ledgers, [call], m.FlushCache(call=call), timeout_s))[0]

    async def probe(
        self,
        endpoints: tuple[str, ...],
        incarnation: str,
        block_size: int,
        fetch: bool,
        *,
        timeout_s: float,
    ) -> m.Probed:
        """Try the KV link to a peer. A step that is computed has to end first. Raises EngineDown or DeadlineExceeded."""
        self._calls += 1
        call = self._calls
        command = m.Probe(
            call=call,
            endpoints=endpoints,
            incarnation=incarnation,
            block_size=block_size,
            fetch=fetch,
        )
        return (await self._ask(self._probes, [call], command, timeout_s))[0]

    async def _ask(
        self,
        waiting: Waiting[Key, Answer],
        keys: list[Key],
        command: m.Command,
        timeout_s: float,
    ) -> list[Answer]:
        """Send a command and wait for one answer per key. Who asks the same meanwhile shares the answer."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in keys]
        for key, future in zip(keys, futures, strict=True):
            waiting.setdefault(key, []).append(future)
        try:
            self._send(command)
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*futures)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s} s") from error
        finally:
            for key, future in zip(keys, futures, strict=True):
                if future in waiting.get(key, ()):
                    waiting[key].remove(future)
                    if not waiting[key]:
                        del waiting[key]

    @property
    def pid(self) -> int:
        """Process id of the engine, 0 before it was started."""
        return self._process.pid if self._process is not None else 0

    @property
    def pids(self) -> tuple[int, ...]:
        """The same, of an engine that was started."""
        return (self.pid,) if self.pid else ()

    async def close(self) -> None:
        """Close the pipe and wait; an engine that does not leave is killed."""
        self._closing = True
        self.down = self.down or "the daemon stops"
        self._fail_waiters()
        if self._opened is not None:
            await self._opened.close()
        if self._process is None:
            return
        deadline = self._clock.now() + _STOP_TIMEOUT_S
        while self._process.poll() is None:
            if self._clock.now() > deadline:
                _log.warning("engine killed", pid=self._process.pid, waited_s=_STOP_TIMEOUT_S)
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
                return
            await asyncio.sleep(0.01)


def _resolve(waiting: Waiting[Key, Answer], key: Key, value: Answer) -> None:
    """Nobody may be waiting any more: then the answer came after its deadline."""
    for future in waiting.pop(key, ()):
        if not future.done():
            future.set_result(value)


def _down() -> RequestError:
    return EngineDown("the engine of this instance is down; the supervisor restarts it")


def _start_error(event: m.Failed) -> StartError:
    for leaf in StartError.__subclasses__():
        if leaf.exit_code == event.exit_code:
            return leaf(event.message)
    return StartError(event.message)
