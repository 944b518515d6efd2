"""uvicorn's httptools protocol with the limits it lacks: URL, headers, connections, slow headers, unread answers.

It also goes on reading when a client offers to upgrade the connection, as Java's does by default (h2c): the parser stops there
and would lose the body, or take it for the next request.

`limited_protocol` makes the class the server gives to uvicorn. A refusal here is an OpenAI error object too, written by
hand, because no application is running yet.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xllm_py.base.errors import (
    ConcurrencyLimit,
    HeadersTooLarge,
    InvalidValue,
    RequestError,
    RequestReadTimeout,
    UriTooLong,
)
from xllm_py.openai.errors import error_body, error_headers
from xllm_py.openai.settings import HttpSettings

_PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    414: b"URI Too Long",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
}


class _Refused(Exception):
    """Leaves the parser from one of its callbacks; uvicorn then asks for a 400, which is already answered."""


class _Parser:
    """httptools' parser for a server that never upgrades: it starts anew behind the head that asked for it."""

    def __init__(self, protocol: _LimitedProtocol) -> None:
        self._protocol = protocol
        self._parser = _fresh_parser(protocol)

    def get_method(self) -> bytes:
        """Of the request whose head was read last."""
        method: bytes = self._parser.get_method()
        return method

    def get_http_version(self) -> str:
        """The same."""
        version: str = self._parser.get_http_version()
        return version

    def should_keep_alive(self) -> bool:
        """The same."""
        return bool(self._parser.should_keep_alive())

    def should_upgrade(self) -> bool:
        """Never."""
        return False

    def feed_data(self, data: bytes) -> None:
        """As httptools does it; raises HttpParserError."""
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._parser = _fresh_parser(self._protocol)
                self._protocol.on_upgrade_ignored(self._parser)
                data = data[upgrade.args[0] :]
            else:
                return


def _fresh_parser(protocol: _LimitedProtocol) -> Any:
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
    return parser


class _LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    settings: HttpSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)  # type: ignore[assignment]  # what uvicorn asks of it is there
        self._repeating = False  # a head that was understood already is read once more
        self._num_header_bytes = 0
        self._in_headers = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; else start the clock for its first headers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.settings.slow_reader_bytes)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(ConcurrencyLimit("too many connections; try again soon"))
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer left."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a connection that was refused is not listened to any more."""
        if self._refused or self.parser is None:
            return
        were_in_headers = self._in_headers
        super().data_received(data)
        if were_in_headers and self._in_headers and not self._refused:
            # the parser keeps an unfinished header to itself, however long it grows
            self._num_header_bytes += len(data)
            self._check_header_bytes(inside=False)

    def on_upgrade_ignored(self, parser: Any) -> None:
        """The parser believes that its connection is another protocol's now: tell a new one only how long the body is."""
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self._repeating = True
        parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        self.cycle.more_body = self._repeating  # unless it was read to its end
        self._repeating = False

    def on_message_complete(self) -> None:
        """The body is whole."""
        if self._repeating:
            self._repeating = False
        super().on_message_complete()

    def on_message_begin(self) -> None:
        """A request starts: its headers have `read_timeout_s`."""
        if self._repeating:
            return
        self._num_header_bytes = 0
        self._in_headers = True
        if self._header_timer is None and not self._is_answering():
            self._start_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the URL."""
        if self._repeating:
            return
        super().on_url(url)
        if len(self.url) > self.settings.max_url_bytes:
            self._refuse_inside(UriTooLong(f"the URL exceeds {self.settings.max_url_bytes} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole header."""
        if self._repeating:
            return
        self._num_header_bytes += len(name) + len(value) + 4
        self._check_header_bytes(inside=True)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application takes over."""
        if self._repeating:
            return
        self._stop_timer()
        self._in_headers = False
        super().on_headers_complete()
        self.scope["extensions"] = {"xllm.abort": self.transport.abort}  # type: ignore[dict-item]

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read."""
        if not self._refused:
            self._refuse(InvalidValue("this is not HTTP/1.1; check the client"))

    def _check_header_bytes(self, *, inside: bool) -> None:
        settings = self.settings
        if (
            len(self.headers) < settings.max_header_fields
            and self._num_header_bytes <= settings.max_header_bytes
        ):
            return
        error = HeadersTooLarge(
            f"the headers exceed {settings.max_header_bytes} bytes or "
            f"{settings.max_header_fields} fields"
        )
        if inside:
            self._refuse_inside(error)
        self._refuse(error)

    def _refuse_inside(self, error: RequestError) -> None:
        self._refuse(error)
        raise _Refused

    def _refuse(self, error: RequestError) -> None:
        self._refused = True
        self._stop_timer()
        if self._is_answering() and not self._awaits_body():
            self.transport.abort()  # an error would land in the middle of another answer
            return
        body = error_body(error)
        status = error.http_status
        lines = [
            b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b"")),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            *(name + b": " + value for name, value in error_headers(error)),
        ]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _awaits_body(self) -> bool:
        """Whether the request that is read is the only one, and nothing was answered yet."""
        return self.cycle.more_body and not self.cycle.response_started and not self.pipeline

    def _start_timer(self) -> None:
        limit_s = self.settings.read_timeout_s
        self._header_timer = self.loop.call_later(limit_s, self._on_slow_headers)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_slow_headers(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            limit_s = self.settings.read_timeout_s
            self._refuse(RequestReadTimeout(f"the headers took longer than {limit_s:g} s"))


def limited_protocol(settings: HttpSettings) -> type[HttpToolsProtocol]:
    """The protocol class with these settings."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"settings": settings})
