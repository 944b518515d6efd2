"""Several engines behind one door (data parallel, `--dp_size`): each has its devices, its scheduler, its cache and its KV port.

A request stays with the engine it was given to, the one with the least to do; everything said about it later goes there. To the rest of the instance they look like
one EngineLink: counts are sums, a block is cached while one of them has it, and the first that ends is the end of the instance.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TypeAlias

from xllm_py.base.clock import Clock
from xllm_py.base.process import num_cores
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.config import EngineConfig
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.instance.engine_link import EngineHandlers, EngineLink
from xllm_py.wire import messages as m

_MOST_HOMES = 1 << 16  # requests whose engine is remembered; the oldest have long ended

_Key = tuple[str, int]  # request, attempt


class Replicas:
    """So many EngineLinks; see there for what a method does."""

    def __init__(
        self, count: int, *, handlers: EngineHandlers, tasks: TaskFamily, clock: Clock
    ) -> None:
        self._hear_progress = handlers.on_progress
        self._clock = clock
        self._links = [
            EngineLink(handlers=self._handlers(handlers, index), tasks=tasks, clock=clock)
            for index in range(count)
        ]
        self._given = [0] * count  # requests since the engine last spoke
        self._homes: OrderedDict[_Key, int] = OrderedDict()
        self._holders: Counter[bytes] = Counter()  # of each cached block
        self._turn = 0
        self.progress = m.Progress()

    def _handlers(self, handlers: EngineHandlers, index: int) -> EngineHandlers:
        def on_offers(offers: list[Offer]) -> None:
            for offer in offers:
                self._settle((offer.submission.request_id, offer.submission.attempt), index)
            handlers.on_offers(offers)

        return dataclasses.replace(
            handlers,
            on_offers=on_offers,
            on_progress=functools.partial(self._on_progress, index),
        )

    async def start(self, config: EngineConfig, *, timeout_s: float) -> m.Ready:
        """All at once. Raises the StartError leaf of the first that cannot."""
        configs = shares(config, len(self._links))
        starting = [
            link.start(share, timeout_s=timeout_s)
            for link, share in zip(self._links, configs, strict=True)
        ]
        every = await asyncio.gather(*starting)
        first = every[0]
        return dataclasses.replace(
            first,
            num_blocks=min(ready.num_blocks for ready in every),  # what one request may have
            device=",".join(ready.device for ready in every),
            kv_endpoints=tuple(where for ready in every for where in ready.kv_endpoints),
        )

    def _on_progress(self, index: int, event: m.Progress) -> None:
        self._given[index] = 0
        added, removed = [], []
        for digest in event.evicted:
            self._holders[digest] -= 1
            if self._holders[digest] <= 0:
                del self._holders[digest]
                removed.append(digest)
        for digest in event.cached:
            self._holders[digest] += 1
            if self._holders[digest] == 1:
                added.append(digest)
        every = [link.progress for link in self._links]
        self.progress = m.Progress(
            steps=sum(each.steps for each in every),
            tokens=sum(each.tokens for each in every),
            step_s=max(each.step_s for each in every),
            announced_s=max(each.announced_s for each in every),
            waiting=sum(each.waiting for each in every),
            running=sum(each.running for each in every),
            blocks=_sum(each.blocks for each in every),
            prefix=_sum(each.prefix for each in every),
            cached=added,
            evicted=removed,
        )
        self._hear_progress(self.progress)

    @property
    def progress_at(self) -> float:
        """When the one that has work and has been silent for longest last spoke; when nobody has work, the last word of all."""
        busy = [
            link.progress_at
            for link in self._links
            if link.progress.waiting + link.progress.running
        ]
        return min(busy) if busy else max(link.progress_at for link in self._links)

    @property
    def down(self) -> str:
        """Why one of them is down."""
        return next((link.down for link in self._links if link.down), "")

    @property
    def pids(self) -> tuple[int, ...]:
        """Of those that were started."""
        return tuple(pid for link in self._links for pid in link.pids)

    # ---- who has what

    def _settle(self, key: _Key, index: int) -> None:
        self._homes[key] = index
        self._homes.move_to_end(key)
        if len(self._homes) > _MOST_HOMES:
            self._homes.popitem(last=False)

    def _least(self) -> int:
        """The engine with the fewest requests, of equal ones that with the most free blocks, of equal ones the next in turn."""
        self._turn += 1
        count = len(self._links)

        def load(index: int) -> tuple[int, int, int]:
            told = self._links[index].progress
            free = told.blocks.get("free", 0) + told.blocks.get("cached", 0)
            waiting = told.waiting + told.running + self._given[index]
            return waiting, -free, (index - self._turn) % count

        return min(range(count), key=load)

    def _by_home(self, keys: Iterable[_Key]) -> dict[int, list[int]]:
        """Engine -> places of its keys. What nobody knows is asked of the first, which does not know it either."""
        found: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            found.setdefault(self._homes.get(key, 0), []).append(place)
        return found

    # ---- what an EngineLink does

    def submit(self, submission: Submission) -> None:
        """To the one with the least to do. Raises EngineDown."""
        index = self._least()
        self._given[index] += 1
        self._settle((submission.request_id, submission.attempt), index)
        self._links[index].submit(submission)

    def abort(self, request_ids: list[str], attempts: list[int]) -> None:
        """Of all: an attempt may be any."""
        for link in self._links:
            link.abort(request_ids, attempts)

    def answer_offers(self, answers: list[OfferAnswer]) -> None:
        """To those who offered."""
        homes = self._by_home((answer.request_id, answer.attempt) for answer in answers)
        for index, places in homes.items():
            self._links[index].answer_offers([answers[place] for place in places])

    def first_taken(self, taken: m.FirstTaken) -> None:
        """To those who gave."""
        keys = list(zip(taken.request_ids, taken.attempts, strict=True))
        for index, places in self._by_home(keys).items():
            self._links[index].first_taken(
                m.FirstTaken(
                    request_ids=[taken.request_ids[place] for place in places],
                    attempts=[taken.attempts[place] for place in places],
                    accepted=[taken.accepted[place] for place in places],
                    reached=[taken.reached[place] for place in places] if taken.reached else [],
                )
            )

    def peer_gone(self, incarnation: str) -> None:
        """Any of them may hold something for it."""
        for link in self._links:
            link.peer_gone(incarnation)

    def drain(self) -> None:
        """All."""
        for link in self._links:
            link.drain()

    async def offer(self, offers: list[Offer], *, timeout_s: float) -> list[OfferAnswer]:
        """An offer that is repeated goes where it was granted, another one to the engine with the least to do."""
        keys = [(offer.submission.request_id, offer.submission.attempt) for offer in offers]
        for key in keys:
            if key not in self._homes:
                index = self._least()
                self._given[index] += 1
                self._settle(key, index)
        found: dict[int, OfferAnswer] = {}

        async def ask(index: int, places: list[int]) -> None:
            mine = [offers[place] for place in places]
            answers = await self._links[index].offer(mine, timeout_s=timeout_s)
            found.update(zip(places, answers, strict=True))

        await asyncio.gather(*(ask(*item) for item in self._by_home(keys).items()))
        for place, key in enumerate(keys):
            if found[place].refusal:
                self._homes.pop(key, None)  # another one may have room the next time
        return [found[place] for place in range(len(offers))]

    async def first_tokens(self, firsts: list[FirstToken], *, timeout_s: float) -> list[bool]:
        """To those who granted."""
        found: dict[int, bool] = {}

        async def ask(index: int, places: list[int]) -> None:
            mine = [firsts[place] for place in places]
            taken = await self._links[index].first_tokens(mine, timeout_s=timeout_s)
            found.update(zip(places, taken, strict=True))

        homes = self._by_home((first.request_id, first.attempt) for first in firsts)
        await asyncio.gather(*(ask(*item) for item in homes.items()))
        return [found[place] for place in range(len(firsts))]

    async def ledger(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """Sums."""
        return _sum(
            await asyncio.gather(*(link.ledger(timeout_s=timeout_s) for link in self._links))
        )

    async def flush_cache(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """Of all."""
        return _sum(
            await asyncio.gather(*(link.flush_cache(timeout_s=timeout_s) for link in self._links))
        )

    async def probe(
        self,
        endpoints: tuple[str, ...],
        incarnation: str,
        block_size: int,
        fetch: bool,
        *,
        timeout_s: float,
    ) -> m.Probed:
        """By each of them: the first that cannot, or the slowest."""
        every = await asyncio.gather(
            *(
                link.probe(endpoints, incarnation, block_size, fetch, timeout_s=timeout_s)
                for link in self._links
            )
        )
        return worst(every)

    async def close(self) -> None:
        """All at once."""
        await asyncio.gather(*(link.close() for link in self._links))


Engine: TypeAlias = EngineLink | Replicas


def make_engine(count: int, *, handlers: EngineHandlers, tasks: TaskFamily, clock: Clock) -> Engine:
    """The engine of an instance, or what looks like one."""
    if count == 1:
        return EngineLink(handlers=handlers, tasks=tasks, clock=clock)
    return Replicas(count, handlers=handlers, tasks=tasks, clock=clock)


def shares(config: EngineConfig, count: int) -> list[EngineConfig]:
    """What each of so many engines is told: its devices, a KV port near the one asked for, and on the host its share of the cores."""
    each = len(config.devices) // count
    threads = config.cpu_threads
    if not threads and config.devices[0].startswith("cpu:"):
        threads = max(1, num_cores() // len(config.devices))
    return [
        dataclasses.replace(
            config,
            devices=config.devices[index * each : (index + 1) * each],
            cpu_threads=threads,
            kv_port=config.kv_port + index if config.kv_port else 0,
            kv_port_may_move=config.kv_port_may_move or index > 0,
            kv_first_stream=index * config.kv_streams,
        )
        for index in range(count)
    ]


def worst(every: Iterable[m.Probed]) -> m.Probed:
    """Of what was found over several links."""
    return min(every, key=lambda found: (found.works, -found.round_trip_s))


def _sum(every: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in every:
        total.update(counts)
    return dict(total)
