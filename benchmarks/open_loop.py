"""Sends requests when they arrive, whatever the answers do, and keeps what came back. Knows neither workloads nor rows."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http_stream import Answer, Stream, connect, encode, read_answer
from benchmarks.load import Target
from benchmarks.traffic import Asked

_TICK_S = 0.25


@dataclass(frozen=True)
class Api:
    """Which of the two routes, and fields that are added to each body."""

    chat: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    def request(self, target: Target, asked: Asked) -> bytes:
        """Greedy, streamed, and as long as asked for where the server knows `ignore_eos`."""
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": asked.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **dict(self.extra),
        }
        if not self.chat:
            return encode(target.url, "/v1/completions", {"prompt": asked.prompt, **body})
        text = asked.prompt if isinstance(asked.prompt, str) else " ".join(map(str, asked.prompt))
        messages = [{"role": "user", "content": text}]
        return encode(target.url, "/v1/chat/completions", {"messages": messages, **body})


@dataclass(frozen=True)
class Load:
    """What became of the requests, in order of arrival, and how long it took from the first arrival to the last answer."""

    asked: Sequence[Asked]
    answers: Sequence[Answer]
    seconds: float

    @property
    def good(self) -> list[Answer]:
        """Those that ended well, with text."""
        return [each for each in self.answers if each.done and not each.error and each.text_at]

    @property
    def failed(self) -> list[str]:
        """What became of the others."""
        return [
            each.error or ("no text came" if each.done else "the stream did not end with [DONE]")
            for each in self.answers
            if each.error or not each.done or not each.text_at
        ]


async def run_open(
    target: Target,
    asked: Sequence[Asked],
    *,
    api: Api = Api(),  # frozen
    at_once: int = 0,
    progress: bool = False,
) -> Load:
    """at_once: the most requests open at a time, the others wait; 0: no limit. progress: a line on stderr."""
    requests = [api.request(target, each) for each in asked]
    gate = asyncio.Semaphore(at_once or len(asked) or 1)
    idle: list[Any] = []
    ended = 0
    began = time.perf_counter()

    async def ask(arrival: Asked, request: bytes) -> Answer:
        nonlocal ended
        await asyncio.sleep(began + arrival.at_s - time.perf_counter())
        async with gate:
            answer = await _ask(target, request, idle)
        ended += 1
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(*each)) for each in zip(asked, requests, strict=True)]
        while progress and ended < len(tasks):
            _show(ended, len(tasks), time.perf_counter() - began)
            await asyncio.wait(tasks, timeout=_TICK_S, return_when=asyncio.ALL_COMPLETED)
    seconds = time.perf_counter() - began
    if progress:
        _show(ended, len(tasks), seconds)
        print(file=sys.stderr)
    for connection in idle:
        connection.close()
    return Load(asked, [task.result() for task in tasks], seconds)


async def _ask(target: Target, request: bytes, idle: list[Any]) -> Answer:
    """Over a connection that is free, or a new one. A server that breaks off is an answer too."""
    sent = time.perf_counter()
    try:
        connection = idle.pop() if idle else await connect(target.url)
        if not connection.usable:
            connection = await connect(target.url)
        answer = read_answer(await connection.post(request))
    except (OSError, TimeoutError) as error:
        return _broken(sent, f"{type(error).__name__}: {error}")
    if connection.usable:
        idle.append(connection)
    return answer


def _broken(sent: float, error: str) -> Answer:
    stream = Stream(sent_at=sent, ended_at=time.perf_counter())
    return Answer(stream.sent_at, stream.ended_at, [], 0, False, error)


def _show(ended: int, total: int, seconds: float) -> None:
    width = 30
    bar = "#" * (width * ended // total)
    text = f"\r[{bar:<{width}}] {ended}/{total} answers, {seconds:.0f} s"
    print(text, end="", file=sys.stderr, flush=True)
