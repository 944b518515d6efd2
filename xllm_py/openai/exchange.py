"""One HTTP request and its answer over raw ASGI.

Made by App for each request. Reads the body within limits, watches for the client's leaving, writes JSON or an event
stream, and can be interrupted with an error from outside. Knows nothing of models or tokens.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from xllm_py.base import failpoints, ids, log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import (
    BodyTooLarge,
    ClientClosed,
    RequestError,
    RequestReadTimeout,
    UnsupportedMediaType,
)
from xllm_py.base.tasks import TaskFamily
from xllm_py.openai import sse
from xllm_py.openai.errors import error_body, error_headers

_log = log.get(__name__)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

JSON = b"application/json"
_LAST_WORD_S = 1.0  # how long a client that does not read may delay the end of its failed stream
_UNATTENDED_S = 0.05  # a task that looks out for the client costs as much as reading its request
_DISCARD_S = 5.0  # how long the rest of an unwanted body is read
_PLAIN = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a handler of a simple route sees."""

    method: str
    path: str  # raw, without the query
    params: Mapping[str, str]  # of the route's pattern
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    label: str = ""  # x-request-id


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A body that is not JSON, from a handler."""

    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[tuple[int, object]]]


class Exchange:
    """One request on its way. `status` is what went, or would have gone, to the client."""

    def __init__(self, scope: Message, receive: Receive, send: Send, clock: Clock) -> None:
        self._receive = receive
        self._send = send
        self._clock = clock
        self._sending = asyncio.Lock()
        self._task = asyncio.current_task()
        self._complete = False  # the last message was handed to the server
        self._ended = False  # and taken by it
        self._last_write = clock.now()
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get("xllm.abort")
        self._attend: Callable[[], None] | None = None  # begin to look out for the client
        self.started = False
        self.status = 0
        self.interruption: RequestError | None = None
        self.arrived = clock.now()
        self.arrived_wall = int(clock.wall())
        self.method: str = scope["method"]
        raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        self.path = raw_path.partition(b"?")[0].decode("latin-1")
        self._query: bytes = scope.get("query_string", b"")
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        length = self.headers.get("content-length", "0")
        self.has_body = length != "0" or "transfer-encoding" in self.headers
        self._unread = self.has_body  # part of the body has not been taken yet
        self.label = ids.label_or_new(self.headers.get("x-request-id"), "req")
        self.trace = ids.child_trace(self.headers.get("traceparent"))
        self.explain: Callable[[], str] | None = None  # for who asks with x-xllm-explain

    def request(self, params: Mapping[str, str], body: bytes = b"") -> Request:
        """The frozen view for simple handlers."""
        return Request(
            method=self.method,
            path=self.path,
            params=params,
            query=dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True)),
            headers=self.headers,
            body=body,
            label=self.label,
        )

    # --- reading

    async def read_json(self, *, limit: int, timeout_s: float) -> bytes:
        """The whole body of a JSON request; raises 408, 413, 415 or ClientClosed."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise UnsupportedMediaType("send the header content-type: application/json")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedMediaType("compressed bodies are not supported; send it plain")
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read(limit)
        except TimeoutError as error:
            self._unread = False  # nothing is coming
            raise RequestReadTimeout(f"the body took longer than {timeout_s:g} s") from error

    async def _read(self, limit: int) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientClosed("the client left")
            body += message.get("body", b"")
            self._unread = message.get("more_body", False)
            if len(body) > limit:
                raise BodyTooLarge(f"the body is larger than {limit} bytes")
            if not self._unread:
                return bytes(body)

    # --- watching

    @contextmanager
    def attended(
        self, tasks: TaskFamily, keepalive_s: float, *, soon: bool = True
    ) -> Iterator[None]:
        """While inside, the client's leaving interrupts this exchange and silence is filled with comments.

        To be entered once the body has been read. soon: False where a short answer may be gone before it is worth it: then it begins with a
        stream's first byte, or a moment later.
        """
        watchers: list[asyncio.Task[None]] = []

        def watch() -> None:
            if not watchers:
                watchers.append(tasks.start(self._watch(keepalive_s), name="client"))

        self._attend = watch
        beginning = asyncio.get_running_loop().call_later(0.0 if soon else _UNATTENDED_S, watch)
        try:
            yield
        finally:
            self._attend = None
            beginning.cancel()
            for watcher in watchers:
                watcher.cancel()

    async def _watch(self, keepalive_s: float) -> None:
        while not self._complete:
            try:
                async with asyncio.timeout(keepalive_s):
                    message = await self._receive()
            except TimeoutError:
                await self._keep_alive(keepalive_s)
                continue
            if message["type"] == "http.disconnect":
                self.interrupt(ClientClosed("the client left"))
                return

    async def _keep_alive(self, keepalive_s: float) -> None:
        silent_s = self._clock.now() - self._last_write
        if self.started and silent_s >= keepalive_s / 2 and not self._sending.locked():
            await self.write(sse.KEEP_ALIVE)

    def interrupt(self, error: RequestError) -> None:
        """End this exchange with `error` wherever it stands; without effect once it is complete."""
        if self._complete or self.interruption is not None or self._task is None:
            return
        self.interruption = error
        self._task.cancel()

    # --- writing

    def _common_headers(self) -> HeaderList:
        headers = [(b"x-request-id", self.label.encode())]
        sent_at = self.headers.get("x-request-time", "")
        if _PLAIN.fullmatch(sent_at):
            headers.append((b"x-request-time", sent_at.encode()))
        if self.trace:
            headers.append((b"traceparent", self.trace.encode()))
        if self.explain is not None and "x-xllm-explain" in self.headers:
            headers.append((b"x-xllm-route", self.explain().encode("latin-1", "replace")))
        return headers

    async def respond(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = JSON,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """A whole answer at once."""
        self.started, self.status = True, status
        sent = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *self._common_headers(),
            *headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})
        if self._unread:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            body = b""
            await self._discard_body()
        self._complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self._ended = True

    async def _discard_body(self) -> None:
        """Take what the client is still sending: a connection closed before that takes the answer back."""
        try:
            async with asyncio.timeout(_DISCARD_S):
                while self._unread:
                    message = await self._receive()
                    gone = message["type"] == "http.disconnect"
                    self._unread = not gone and message.get("more_body", False)
        except TimeoutError:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._abort is not None:
            self._abort()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """A piece of an event stream; the first one sends the headers. Waits while the client does not read."""
        async with self._sending:
            if self._complete:
                return
            if not self.started:
                self.started, self.status = True, 200
                if self._attend is not None:
                    self._attend()
                headers = [*sse.HEADERS, *self._common_headers()]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self._complete = last
            failpoints.hit("m.client.pre_write")
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
            failpoints.hit("m.client.post_write")
            self._ended = last
            self._last_write = self._clock.now()

    async def fail(self, error: RequestError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """End with an error: its true status while nothing was sent, else a last event without [DONE]."""
        self.status = error.http_status
        if isinstance(error, ClientClosed):
            return
        if not self.started:
            sent = [*error_headers(error), *headers]
            await self.respond(error.http_status, error_body(error), headers=sent)
            return
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await self.write(sse.error_event(error), last=True)
        except TimeoutError:
            _log.debug("the client does not read", label=self.label)
        if not self._ended:
            self._complete = True
            self._hang_up()
