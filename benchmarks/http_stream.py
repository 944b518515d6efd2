"""A small HTTP/1.1 client for event streams that costs the measured machine little.

It keeps the bytes of an answer with the time they came; they are looked into (`read_answer`) when the load is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

ANSWER_TIMEOUT_S = 300.0


@dataclass
class Stream:
    """One answer as it came."""

    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # when, and what


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request; seconds."""

    sent_at: float
    ended_at: float
    text_at: list[float]  # arrival of each event with text
    num_tokens: int  # as the server counts them
    done: bool  # the last event was [DONE]
    error: str  # empty: none

    @property
    def ttft(self) -> float:
        """To the first text."""
        return self.text_at[0] - self.sent_at

    @property
    def tpot(self) -> float:
        """Per token after the first."""
        return (self.text_at[-1] - self.text_at[0]) / max(1, self.num_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one event with text and the next."""
        return [late - early for early, late in zip(self.text_at, self.text_at[1:], strict=False)]

    @property
    def e2e(self) -> float:
        """To the end of the answer."""
        return self.ended_at - self.sent_at


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._stream = Stream(0.0)
        self._answered: asyncio.Future[None] | None = None
        self._now = 0.0
        self.usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.usable = True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.usable = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._stream.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """See httptools."""
        self._stream.ended_at = self._now
        self._stream.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    async def post(self, request: bytes) -> Stream:
        """Send a whole request and wait for its whole answer. Raises OSError or TimeoutError."""
        self._parser = httptools.HttpResponseParser(self)
        self._answered = asyncio.get_running_loop().create_future()
        self._stream = Stream(time.perf_counter())
        self._transport.write(request)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._answered
        return self._stream

    def close(self) -> None:
        """Not usable from now on."""
        self.usable = False
        self._transport.close()


async def connect(url: str) -> Connection:
    """To the host and port of an http:// URL."""
    where = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, where.hostname, where.port or 80)
    return connection


def encode(url: str, path: str, body: dict[str, Any]) -> bytes:
    """A POST with its headers."""
    where = urlsplit(url)
    content = json.dumps(body).encode()
    head = (
        f"POST {where.path.rstrip('/')}{path} HTTP/1.1\r\nhost: {where.netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read_answer(stream: Stream) -> Answer:
    """Text events, the server's token count, and whether it ended well."""
    text_at: list[float] = []
    num_tokens, done, error = 0, False, ""
    if stream.status != 200:
        error = f"{stream.status}: {b''.join(body for _, body in stream.pieces).decode()[:500]}"
    for at, data in events(stream) if not error else ():
        done = data == b"[DONE]"
        if done:
            continue
        event = json.loads(data)
        if event.get("error"):
            error = json.dumps(event["error"])
        if any(_text_of(choice) for choice in event.get("choices", ())):
            text_at.append(at)
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    return Answer(stream.sent_at, stream.ended_at, text_at, num_tokens, done, error)


def events(stream: Stream) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its last byte came."""
    rest = b""
    for at, body in stream.pieces:
        *whole, rest = (rest + body).split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield at, line[6:]


def _text_of(choice: dict[str, Any]) -> str:
    text: str = choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text
