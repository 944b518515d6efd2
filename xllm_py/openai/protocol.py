"""uvicorn's httptools protocol with the limits it lacks: URL, headers, connections, slow headers, unread answers.

`limited_protocol` makes the class the server gives to uvicorn. A refusal here is an OpenAI error object too, written by
hand, because no application is running yet.
"""

from __future__ import annotations

import asyncio
from typing import Any

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


class _LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    settings: HttpSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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

    def on_message_begin(self) -> None:
        """A request starts: its headers have `read_timeout_s`."""
        self._num_header_bytes = 0
        self._in_headers = True
        if self._header_timer is None and not self._is_answering():
            self._start_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the URL."""
        super().on_url(url)
        if len(self.url) > self.settings.max_url_bytes:
            self._refuse_inside(UriTooLong(f"the URL exceeds {self.settings.max_url_bytes} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole header."""
        self._num_header_bytes += len(name) + len(value) + 4
        self._check_header_bytes(inside=True)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application takes over."""
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
        if self._is_answering():
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
