"""What is asked, and by how many clients at a time: workloads and the closed loop. Knows neither processes nor rows."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http_stream import Answer, Stream, connect, encode, read_answer


@dataclass(frozen=True)
class Target:
    """A server under load."""

    name: str
    url: str
    model: str


@dataclass(frozen=True)
class Workload:
    """Prompts of random token ids, all of one length, and answers of one length."""

    prompt_tokens: int
    output_tokens: int
    seed: int
    vocabulary: int = 256  # ids below it, which every model has

    def prompt(self, number: int) -> list[int]:
        """Of the request with that number; the same for every target, and no two alike."""
        draw = random.Random(f"{self.seed} {number}")
        return [draw.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]

    def body(self, model: str, number: int) -> dict[str, Any]:
        """The request: greedy, streamed, and never shorter than asked for."""
        return {
            "model": model,
            "prompt": self.prompt(number),
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def fault(self, answer: Answer) -> str:
        """Why the answer is not what was asked for; empty when it is."""
        if answer.error:
            return answer.error
        if not answer.done:
            return "the stream did not end with [DONE]"
        if answer.num_tokens != self.output_tokens:
            return f"{answer.num_tokens} tokens instead of {self.output_tokens}"
        return "" if answer.text_at else "no text came"


@dataclass(frozen=True)
class Round:
    """One load on one target, from the first request to the last answer."""

    answers: list[Answer]
    seconds: float

    @property
    def requests_s(self) -> float:
        """Requests per second."""
        return len(self.answers) / self.seconds

    @property
    def tokens_s(self) -> float:
        """Generated tokens per second."""
        return sum(answer.num_tokens for answer in self.answers) / self.seconds


async def run_closed(
    target: Target, workload: Workload, clients: int, per_client: int, first: int
) -> Round:
    """Each client sends its next request when it has its answer. Stops the benchmark at the first wrong answer.

    first: the number of the first request, so that rounds do not repeat each other.
    """
    numbers = range(first, first + clients * per_client)
    requests = [
        encode(target.url, "/v1/completions", workload.body(target.model, number))
        for number in numbers
    ]
    queues = [requests[client::clients] for client in range(clients)]
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_ask_all(target, queue)) for queue in queues]
    seconds = time.perf_counter() - began
    answers = [read_answer(stream) for task in tasks for stream in task.result()]
    for answer in answers:
        fault = workload.fault(answer)
        if fault:
            raise SystemExit(f"{target.name}: {fault}")
    return Round(answers, seconds)


async def _ask_all(target: Target, requests: Sequence[bytes]) -> list[Stream]:
    """One client: its requests in order, over one connection while the server keeps it."""
    connection = await connect(target.url)
    streams = []
    for request in requests:
        if not connection.usable:
            connection = await connect(target.url)
        streams.append(await connection.post(request))
    connection.close()
    return streams
