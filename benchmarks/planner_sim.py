"""A cluster in virtual time: instances that take as long for a step as a profile says, the master's round robin, and the same arrivals as a
measured load. It knows batching, chunks, the order of arrival and the transfer of KV; it does not compute.

A step of n tokens takes what all linears take for n (interpolated between measured sizes), the head for the rows that are sampled, and
attention by the number of (query, key) pairs, apart for prompts and for decodes: four figures fitted to the profile.
Source of the idea: Zhong et al. 2024, DistServe, section 4.1 (simulation to place instances); Agrawal et al. 2024, Vidur.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import json
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.http_stream import Answer
from benchmarks.open_loop import Load
from benchmarks.traffic import Asked


class Costs:
    """Seconds of a step, from a profile that `xllm --profile_steps` wrote."""

    def __init__(self, profile: dict[str, Any]) -> None:
        alone = [(tokens, s) for tokens, context, s in profile["prefill"] if context == 0]
        self._sizes = [tokens for tokens, _ in alone]
        self._seconds = [seconds for _, seconds in alone]
        self.pair = self._fit_pairs(profile)
        for index, (tokens, seconds) in enumerate(alone):
            self._seconds[index] = max(seconds - self.pair * tokens * tokens / 2, 1e-6)
        decodes: list[tuple[int, int, float]] = profile["decode"]
        self.key = self._fit_keys(decodes)
        rows = [
            (batch, max(0.0, seconds - self.linears(batch) - self.key * batch * context))
            for batch, context, seconds in decodes
            if context == decodes[0][1]
        ]
        self._rows, self._heads = [row for row, _ in rows], [seconds for _, seconds in rows]
        # of a token in one layer: the last layer's are what is on the way when a prompt is computed
        self.last_bytes = profile["kv_bytes_per_token"] / profile["num_layers"]

    @staticmethod
    def read(path: Path) -> Costs:
        """From a file. Raises SystemExit when it is none."""
        try:
            return Costs(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise SystemExit(f"{path} is no profile of xllm --profile_steps ({error!r})") from error

    @staticmethod
    def _fit_pairs(profile: dict[str, Any]) -> float:
        """Seconds of a (query, key) pair of a prompt: what the same chunk costs more behind a context."""
        behind = [(n, context, s) for n, context, s in profile["prefill"] if context]
        alone = {n: s for n, context, s in profile["prefill"] if context == 0}
        found = [(s - alone[n]) / (n * context) for n, context, s in behind if n in alone]
        return max(0.0, statistics.median(found)) if found else 0.0

    @staticmethod
    def _fit_keys(decodes: Sequence[tuple[int, int, float]]) -> float:
        """Seconds of a key of a decode, from one sequence behind contexts of several lengths."""
        single = sorted((context, seconds) for batch, context, seconds in decodes if batch == 1)
        (least, fast), (most, slow) = single[0], single[-1]
        return max(0.0, (slow - fast) / (most - least)) if most > least else 0.0

    def linears(self, tokens: int) -> float:
        """All linears for so many tokens, and everything that is there for one."""
        return _between(self._sizes, self._seconds, tokens)

    def step(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
        """chunks: (tokens, context before them) of prompts; contexts: of each decode."""
        tokens = sum(n for n, _ in chunks)
        pairs = sum(n * (context + n / 2) for n, context in chunks)
        seconds = self.linears(tokens + len(contexts)) + self.pair * pairs
        seconds += self.key * sum(contexts)
        return seconds + (_between(self._rows, self._heads, len(contexts)) if contexts else 0.0)


def _between(sizes: Sequence[int], seconds: Sequence[float], wanted: int) -> float:
    """By a straight line between the measured sizes, and on from the last two."""
    if len(sizes) == 1 or wanted <= sizes[0]:
        return seconds[0]
    right = min(bisect.bisect_left(sizes, wanted), len(sizes) - 1)
    left = right - 1
    share = (wanted - sizes[left]) / (sizes[right] - sizes[left])
    return seconds[left] + share * (seconds[right] - seconds[left])


@dataclass(frozen=True)
class Plant:
    """What is simulated. colocated: instances that do both; else prefill and decode ones."""

    prefills: int
    decodes: int
    colocated: int = 0
    chunk: int = 10240  # tokens of a prompt in one step
    max_tokens: int = 10240  # of one step
    max_seqs: int = 1024
    link_bytes_s: float = 1e9
    overhead_s: float = 0.003  # from arrival to the queue, and from a token to the client


@dataclass
class _Request:
    asked: Asked
    prompt: int
    computed: int = 0
    text_at: list[float] = field(default_factory=list)


@dataclass
class _Instance:
    costs: Costs
    plant: Plant
    waiting: deque[_Request] = field(default_factory=deque)
    running: list[_Request] = field(default_factory=list)
    busy: bool = False

    def plan(self) -> tuple[list[tuple[_Request, int]], list[_Request], float]:
        """Every running decode, and of the waiting prompts what fits beside them; first come, first served."""
        decodes = self.running[: self.plant.max_seqs]
        room = self.plant.max_tokens - len(decodes)
        chunks: list[tuple[_Request, int]] = []
        for request in itertools.islice(self.waiting, self.plant.max_seqs - len(decodes)):
            count = min(request.prompt - request.computed, self.plant.chunk, room)
            if count <= 0:
                break
            chunks.append((request, count))
            room -= count
        seconds = self.costs.step(
            [(count, request.computed) for request, count in chunks],
            [request.prompt + len(request.text_at) for request in decodes],
        )
        return chunks, decodes, seconds


class _Simulation:
    """One run. Events are (when, number, what, ...), smallest first."""

    def __init__(self, costs: Costs, plant: Plant) -> None:
        self._plant = plant
        count = plant.colocated or plant.prefills
        self._firsts = [_Instance(costs, plant) for _ in range(count)]
        self._decodes = [_Instance(costs, plant) for _ in range(plant.decodes)]
        self._costs = costs
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = itertools.count()
        self._turn, self._next_decode = (
            itertools.cycle(self._firsts),
            itertools.cycle(self._decodes),
        )

    def run(self, asked: Sequence[Asked]) -> Load:
        """Until the last token."""
        requests = [_Request(each, len(each.prompt)) for each in asked]
        for request in requests:
            self._at(request.asked.at_s + self._plant.overhead_s, "arrive", request)
        now = 0.0
        while self._events:
            now, _, what, subject = heapq.heappop(self._events)
            if what == "arrive":
                self._put(next(self._turn), request=subject, now=now)
            elif what == "landed":
                instance = next(self._next_decode)
                instance.running.append(subject)
                self._start(instance, now)
            else:
                self._end(*subject, now)
        answers = [self._answer(request) for request in requests]
        return Load(asked, answers, now)

    def _at(self, when: float, what: str, subject: Any) -> None:
        heapq.heappush(self._events, (when, next(self._number), what, subject))

    def _put(self, instance: _Instance, *, request: _Request, now: float) -> None:
        instance.waiting.append(request)
        self._start(instance, now)

    def _start(self, instance: _Instance, now: float) -> None:
        if instance.busy or not (instance.waiting or instance.running):
            return
        instance.busy = True
        chunks, decodes, seconds = instance.plan()
        self._at(now + seconds, "end", (instance, chunks, decodes))

    def _end(
        self,
        instance: _Instance,
        chunks: list[tuple[_Request, int]],
        decodes: list[_Request],
        now: float,
    ) -> None:
        instance.busy = False
        for request in decodes:
            self._token(instance, request, now)
        for request, count in chunks:
            request.computed += count
            if request.computed == request.prompt:
                instance.waiting.remove(request)
                request.text_at.append(now)
                self._prefilled(instance, request, now)
        self._start(instance, now)

    def _token(self, instance: _Instance, request: _Request, now: float) -> None:
        request.text_at.append(now)
        if len(request.text_at) >= request.asked.output_tokens:
            instance.running.remove(request)

    def _prefilled(self, instance: _Instance, request: _Request, now: float) -> None:
        """The rest is decoded here, or at a decode instance once what no step could hide has been sent."""
        if request.asked.output_tokens <= 1:
            return
        if self._plant.colocated:
            instance.running.append(request)
            return
        last = self._costs.last_bytes * request.prompt / self._plant.link_bytes_s
        self._at(now + last, "landed", request)

    def _answer(self, request: _Request) -> Answer:
        text_at = [at + self._plant.overhead_s for at in request.text_at]
        sent, end = request.asked.at_s, text_at[-1]
        return Answer(sent, end, text_at, len(text_at), True, "")


def simulate(costs: Costs, plant: Plant, asked: Sequence[Asked]) -> Load:
    """What clients would see."""
    return _Simulation(costs, plant).run(asked)
