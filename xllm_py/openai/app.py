"""The HTTP door as one raw ASGI application: routes, limits, deadlines, drain. Written once for both daemons.

A daemon makes one App over its Backend and hands it to `server.serve_http`. Every request ends here exactly once: with
an answer, an error object, an error event, or, when the client left, with the backend's generators closed.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType

import msgspec

from xllm_py.base import ids, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    ClientClosed,
    ConcurrencyLimit,
    DeadlineExceeded,
    Draining,
    InternalServerError,
    InvalidValue,
    MethodNotAllowed,
    RequestError,
    RequestNotFound,
    RequestReadTimeout,
)
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.openai.backend import Backend
from xllm_py.openai.chat_template import ChatTemplate
from xllm_py.openai.exchange import Exchange, Handler, HeaderList, Message, Plain, Receive, Send
from xllm_py.openai.generation import Generation, Outlet
from xllm_py.openai.host_check import check_host
from xllm_py.openai.intake import Intake, Order
from xllm_py.openai.kept import Kept, KeptAnswers, TokenByToken, place_after, unpacked
from xllm_py.openai.key_check import KeyRing
from xllm_py.openai.measures import Measures
from xllm_py.openai.plain_routes import PlainRoutes
from xllm_py.openai.route_table import RouteTable
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import Tokenizer

_log = log.get(__name__)

_GENERATIONS = ("/v1/completions", "/v1/chat/completions")
_LAG_PERIOD_S = 0.5
_CLOSE_TIMEOUT_S = 5.0

Answerer = Callable[[Exchange, dict[str, str]], Awaitable[None]]


class App:
    """An ASGI 3 application for HTTP."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        settings: HttpSettings,
        metrics: Metrics,
        clock: Clock,
        extra_routes: Mapping[tuple[str, str], Handler] | None = None,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self.settings = settings
        self._clock = clock
        self._tasks = TaskFamily("http")
        self._open: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._kept = KeptAnswers(clock)
        self._keys = KeyRing(settings.api_keys)
        self._measures = Measures(metrics, lambda: len(self._open))
        self._intake = Intake(
            backend,
            tokenizer,
            template,
            settings=settings,
            on_ignored=self._measures.ignored_fields,
        )
        plain = PlainRoutes(
            backend,
            tokenizer,
            self._intake,
            settings=settings,
            metrics=metrics,
            draining=lambda: self._draining,
            keys=self._keys,
        )
        self._routes = self._table({**plain.table(), **(extra_routes or {})})

    def _table(self, plain: Mapping[tuple[str, str], Handler]) -> RouteTable[Answerer]:
        routes: dict[tuple[str, str], Answerer] = {
            ("POST", "/v1/completions"): functools.partial(self._generate, chat=False),
            ("POST", "/v1/chat/completions"): functools.partial(self._generate, chat=True),
            ("GET", "/v1/streams/{id}"): self._resume,
        }
        for (method, path), handler in plain.items():
            if path.startswith("/debug/") and not self.settings.debug_endpoints:
                continue
            routes[(method, path)] = functools.partial(self._run_plain, handler=handler)
        return RouteTable(routes)

    # --- life

    @property
    def num_open(self) -> int:
        """Open generations, for the ledger."""
        return len(self._open)

    def begin_drain(self) -> None:
        """Refuse new generations with 503 draining; what is open goes on."""
        self._draining = True

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no generation is open; False when the time is up before."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what is still open with 503 draining (streams: an error event) and stop the door's own threads."""
        self.begin_drain()
        for exchange in list(self._open):
            exchange.interrupt(Draining("the server is stopping; send the request again"))
        if not await self.drained(_CLOSE_TIMEOUT_S):
            _log.warning("requests did not end", num=len(self._open), waited_s=_CLOSE_TIMEOUT_S)
        await self._tasks.close()
        self._intake.close()

    async def watch_loop(self) -> None:
        """Measure for ever how late the event loop is; run by the server."""
        while True:
            asked = self._clock.now()
            await asyncio.sleep(_LAG_PERIOD_S)
            self._measures.loop_lag(max(0.0, self._clock.now() - asked - _LAG_PERIOD_S))
            self._kept.sweep()

    # --- one request

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI entry. Anything but HTTP is refused by raising."""
        if scope["type"] != "http":
            raise ValueError("only HTTP is served")
        exchange = Exchange(scope, receive, send, self._clock)
        headers: HeaderList = []
        failure: RequestError | None = None
        try:
            await self._dispatch(exchange)
        except RequestError as error:
            failure, headers = error, self._headers_of(exchange, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if exchange.interruption is None or task is None:
                raise
            task.uncancel()
            failure = exchange.interruption
        except Exception:  # noqa: BLE001 - the ASGI edge: whatever went wrong ends this request alone
            _log.exception("request failed", label=exchange.label, path=exchange.path[:80])
            text = f"an internal error ended this request; its label is {exchange.label}"
            failure = InternalServerError(text)
        if failure is not None:
            self._on_failure(exchange, failure)
            await exchange.fail(failure, headers)
        self._measures.on_answered(exchange.path, exchange.status)

    def _on_failure(self, exchange: Exchange, error: RequestError) -> None:
        refused = not exchange.started and not isinstance(error, ClientClosed)
        if refused and exchange.path in _GENERATIONS:
            self._measures.on_rejected(error.code)
        _log.debug("request ended with an error", label=exchange.label, code=error.code)

    async def _dispatch(self, exchange: Exchange) -> None:
        check_host(exchange.headers.get("host"), self.settings.allowed_hosts)
        self._keys.check(exchange.path, exchange.headers.get("authorization"))
        answerer, params = self._routes.find(exchange.method, exchange.path)
        await answerer(exchange, params)

    async def _run_plain(
        self, exchange: Exchange, params: dict[str, str], *, handler: Handler
    ) -> None:
        body = b""
        if exchange.has_body:
            body = await self._read(exchange)
        async with _Deadline(self.settings.request_timeout_s):
            status, value = await handler(exchange.request(params, body))
        if isinstance(value, Plain):
            await exchange.respond(
                status, value.body, content_type=value.content_type.encode("latin-1")
            )
        else:
            await exchange.respond(status, msgspec.json.encode(value))

    async def _generate(self, exchange: Exchange, params: dict[str, str], *, chat: bool) -> None:
        self._admit()
        self._open.add(exchange)
        self._idle.clear()
        try:
            timeout_s = self._timeout_s(exchange)
            async with _Deadline(timeout_s):
                data = await self._read(exchange)
                key = exchange.headers.get("idempotency-key")
                keepalive_s = self.settings.keepalive_s
                # a chat's text is made in another process first
                with exchange.attended(self._tasks, keepalive_s, soon=chat or key is not None):
                    if key is not None:
                        await self._generate_kept(exchange, key, data, chat=chat)
                        return
                    left_s = timeout_s - (self._clock.now() - exchange.arrived)
                    take = self._intake.chat if chat else self._intake.completion
                    order = await take(data, left_s, self._tenant(exchange))
                    order = order.traced(exchange.trace)
                    if order.label is not None and "x-request-id" not in exchange.headers:
                        exchange.label = ids.label_or_new(order.label, "req")
                    exchange.explain = lambda: self._backend.explain(order.response_id)
                    await self._generation(exchange, order).run(self._backend, self._tasks)
        finally:
            self._close_exchange(exchange)

    def _generation(self, outlet: Outlet, order: Order) -> Generation:
        return Generation(
            outlet,
            order,
            vocabulary=self._tokenizer,
            measures=self._measures,
            clock=self._clock,
            do=self._intake.do,
        )

    # --- answers that outlive their connection

    async def _generate_kept(
        self, exchange: Exchange, key: str, data: bytes, *, chat: bool
    ) -> None:
        """Follow the answer of this key, behind a Last-Event-ID when there is one; begin it when it is new."""
        after = place_after(exchange.headers.get("last-event-id"), None)
        kept, fresh = self._kept.open(self._tenant(exchange), key, exchange.path, data)
        if fresh:
            retried = exchange.headers.get("x-stainless-retry-count", "0") != "0"
            self._begin(exchange, kept, data, chat=chat, recall=retried or after is not None)
        await self._follow(exchange, kept, after)

    def _begin(
        self, exchange: Exchange, kept: Kept, data: bytes, *, chat: bool, recall: bool
    ) -> None:
        timeout_s, trace = self._timeout_s(exchange), exchange.trace
        work = self._produce(kept, data, timeout_s, trace, chat=chat, recall=recall)
        kept.task = self._tasks.start(work, name="kept answer")
        kept.task.add_done_callback(lambda _: self._on_produced(kept))

    async def _produce(
        self, kept: Kept, data: bytes, timeout_s: float, trace: str, *, chat: bool, recall: bool
    ) -> None:
        """recall: it may have been asked for elsewhere before."""
        try:
            async with _Deadline(timeout_s):
                take = self._intake.chat if chat else self._intake.completion
                order = await take(data, timeout_s, kept.tenant, kept.identity)
                order = order.traced(trace).kept_as(kept.identity, kept.origin)
                kept.request_id, told = order.response_id, None
                if recall and len(order.submissions) == 1:
                    told = await self._backend.recall(order.response_id)
                generation = self._generation(kept, order)
                await generation.run(TokenByToken(self._backend, told), self._tasks)
        except RequestError as error:
            self._kept.drop(kept)
            kept.fail(error)

    def _on_produced(self, kept: Kept) -> None:
        """Whatever ended it, its readers hear of it."""
        if not kept.done:
            self._kept.drop(kept)
            kept.fail(InternalServerError("the answer was given up; send the request again"))

    async def _follow(self, exchange: Exchange, kept: Kept, after: tuple[int, int] | None) -> None:
        exchange.explain = lambda: self._backend.explain(kept.request_id)
        self._kept.seat(kept, 1)
        try:
            await kept.follow(exchange, after)
        finally:
            self._kept.seat(kept, -1)

    async def _resume(self, exchange: Exchange, params: dict[str, str]) -> None:
        """GET /v1/streams/{id}: the rest of an answer whose connection was lost."""
        query = exchange.request(params).query
        after = place_after(exchange.headers.get("last-event-id"), query.get("starting_after"))
        self._open.add(exchange)
        self._idle.clear()
        try:
            async with _Deadline(self.settings.request_timeout_s):
                with exchange.attended(self._tasks, self.settings.keepalive_s):
                    kept = self._kept.find(self._tenant(exchange), params["id"])
                    kept = kept or await self._recalled(exchange, params["id"])
                    await self._follow(exchange, kept, after)
        finally:
            self._close_exchange(exchange)

    async def _recalled(self, exchange: Exchange, stream_id: str) -> Kept:
        """An answer that was asked for at another master; what was asked is found with it. Raises RequestNotFound."""
        self._admit_new()
        told = await self._backend.recall(stream_id)
        origin = unpacked(told.origin) if told is not None else None
        if origin is None or origin.tenant != self._tenant(exchange):
            raise RequestNotFound(
                "no such stream is known; send the request again with its Idempotency-Key"
            )
        kept, fresh = self._kept.open(origin.tenant, origin.key, origin.path, origin.body)
        if fresh:
            chat = origin.path.endswith("/chat/completions")
            self._begin(exchange, kept, origin.body, chat=chat, recall=True)
        return kept

    def _close_exchange(self, exchange: Exchange) -> None:
        self._open.discard(exchange)
        if not self._open:
            self._idle.set()

    def _tenant(self, exchange: Exchange) -> str:
        return self._keys.holder(exchange.headers.get("authorization")) or ""

    def _admit_new(self) -> None:
        if self._draining:
            raise Draining("the server is stopping; send the request to another one")

    def _admit(self) -> None:
        self._admit_new()
        if len(self._open) >= self.settings.open_limit:
            raise ConcurrencyLimit(
                f"{len(self._open)} requests are open, which is the limit; try again soon"
            )

    async def _read(self, exchange: Exchange) -> bytes:
        settings = self.settings
        return await exchange.read_json(
            limit=settings.max_body_bytes, timeout_s=settings.read_timeout_s
        )

    def _timeout_s(self, exchange: Exchange) -> float:
        """The request's time: the client's header may only shorten ours."""
        header = exchange.headers.get("x-request-timeout")
        if header is None:
            return self.settings.request_timeout_s
        try:
            asked = float(header)
        except ValueError:
            asked = math.nan
        if not (math.isfinite(asked) and asked > 0):
            raise InvalidValue(
                "x-request-timeout must be a positive number of seconds", param="x-request-timeout"
            )
        return min(asked, self.settings.request_timeout_s)

    def _headers_of(self, exchange: Exchange, error: RequestError) -> HeaderList:
        """Headers an error needs beside Retry-After."""
        if isinstance(error, MethodNotAllowed):
            return [(b"allow", self._routes.allowed(exchange.path).encode())]
        if isinstance(error, RequestReadTimeout):
            return [(b"connection", b"close")]
        return []


class _Deadline:
    """Inside, a request has so many seconds; then DeadlineExceeded."""

    __slots__ = ("_limit", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._limit = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            text = f"the request took longer than {self._timeout_s:g} s"
            raise DeadlineExceeded(text) from late
