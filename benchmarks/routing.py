"""Routing policies against each other, over simulated instances: the product's policies, costs and prefix index, and a clock of events.

    python -m benchmarks.routing [--instances 10 100] [--requests 4000] [--seed 0] [--part ttft goodput]

Half of the instances are P, half D, with calibrated step times: a first token after --prefill-ms + tokens * --token-us, decoding at --step-ms +
--row-us a running request. Caches hold --cache-blocks blocks each, least recently used go first. Prompts begin with one of many shared
prefixes, drawn by Zipf's law, as in the published tool-and-agent traces (Qin et al. 2024: about half of all blocks are shared); arrivals are
bursty (gamma, coefficient of variation 3). Loads are shares of what all P could compute without any cache. Two figures:

    ttft       mean time to first token, CAR against RR and LOAD at equal load                   floor: RR / CAR >= 1.5
    goodput    requests a second that keep both targets, SLO_AWARE against LOAD, overloaded      floor: >= 1.3
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.report import emit
from xllm_py.base.errors import QueueTimeout
from xllm_py.cluster.costs import Costs, Typical
from xllm_py.cluster.instance_info import Card, Role
from xllm_py.cluster.policies import Known, choose
from xllm_py.cluster.prefix_index import CacheNews, PrefixIndex
from xllm_py.cluster.routing import Candidate, ClusterView, Facts, Options, options, round_robin

BLOCK = 128
NEWS_S = 0.1  # a heartbeat: so old is what the index knows


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of every instance, in seconds."""

    prefill: float
    token: float
    step: float
    row: float
    kv_bytes: int = 131_072  # a token's
    link: float = 2e9  # bytes/s


@dataclass(slots=True)
class Ask:
    """One request and what became of it."""

    at: float
    hashes: list[bytes]
    num_prompt: int
    num_answer: int
    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    refused: bool = False


class Prefill:
    """One queue, one cache."""

    def __init__(self, name: str, speeds: Speeds, cache_blocks: int) -> None:
        self.name, self.speeds, self.size = name, speeds, cache_blocks
        self.free_at = 0.0
        self.cache: OrderedDict[bytes, None] = OrderedDict()

    def held(self, hashes: list[bytes]) -> int:
        """Leading blocks that are here."""
        return next((n for n, each in enumerate(hashes) if each not in self.cache), len(hashes))

    def keep(self, hashes: list[bytes], changes: list[tuple[str, bytes, bool]]) -> None:
        """Publish, evict."""
        for each in reversed(hashes):
            if each not in self.cache:
                changes.append((self.name, each, True))
            self.cache[each] = None
            self.cache.move_to_end(each)
        while len(self.cache) > self.size:
            changes.append((self.name, self.cache.popitem(last=False)[0], False))


class Decode(Prefill):
    """All running requests advance together; their pace depends on their number."""

    def __init__(self, name: str, speeds: Speeds, cache_blocks: int) -> None:
        super().__init__(name, speeds, cache_blocks)
        self.left: dict[int, float] = {}  # request -> tokens to go
        self.looked_at = 0.0
        self.version = 0

    def pace(self) -> float:
        """Seconds a token."""
        return self.speeds.step + self.speeds.row * max(1, len(self.left))

    def advance(self, now: float) -> None:
        """Let time pass."""
        done = (now - self.looked_at) / self.pace()
        for number in self.left:
            self.left[number] -= done
        self.looked_at = now
        self.version += 1


@dataclass(kw_only=True)
class Simulation:
    """One policy over one list of requests."""

    policy: str
    prefills: list[Prefill]
    decodes: list[Decode]
    ttft_target_s: float
    tpot_target_s: float
    events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The master's side."""
        self.known: dict[int, tuple[Ask, float]] = {}  # those that decode, and when they began
        self.named = {each.name: each for each in (*self.prefills, *self.decodes)}
        typical = Typical()
        self.costs = {name: Costs(typical) for name in self.named}
        self.index = PrefixIndex()
        self.changes: list[tuple[str, bytes, bool]] = []
        self.numbers = dict.fromkeys(self.costs, 1)
        self.count = itertools.count()
        self.turns = [0, 0]
        self.draw = random.Random(5).randrange
        self.found = self.standing()

    def standing(self) -> Options:
        """All pairs."""
        candidates = tuple(candidate(name, name.startswith("p")) for name in self.named)
        linked = frozenset((p.name, d.name) for p in self.prefills for d in self.decodes)
        return options(ClusterView(candidates=candidates, linked=linked))

    def after(self, at: float, what: Callable[[float], None]) -> None:
        """Do it then."""
        heapq.heappush(self.events, (at, next(self.count), what))

    def run(self, asks: list[Ask]) -> None:
        """To the end."""
        for number, ask in enumerate(asks):
            self.after(ask.at, lambda now, n=number, a=ask: self.arrive(n, a, now))
        self.after(0.0, self.beat)
        while len(self.events) > 1 or self.events[0][0] < asks[-1].at:  # the last one is the beat
            now, _, what = heapq.heappop(self.events)
            what(now)

    def beat(self, now: float) -> None:
        """News of all caches, and loads."""
        by_name: dict[str, dict[bytes, bool]] = {}
        for name, digest, added in self.changes:
            by_name.setdefault(name, {})[digest] = added
        self.changes.clear()
        for name, changed in by_name.items():
            since = self.numbers[name]
            self.numbers[name] = self.index.take(
                name,
                CacheNews(
                    since=since,
                    upto=since + 1,
                    added=b"".join(each for each, added in changed.items() if added),
                    removed=b"".join(each for each, added in changed.items() if not added),
                ),
            )
        for name, costs in self.costs.items():
            running = costs.decoding if name.startswith("d") else 0
            costs.report(len(costs.queued), running, 1000, 1000)
        self.after(now + NEWS_S, self.beat)

    def arrive(self, number: int, ask: Ask, now: float) -> None:
        """Place it and begin it."""
        facts = Facts(num_prompt=ask.num_prompt, max_tokens=ask.num_answer)
        held = {name: count * BLOCK for name, count in self.index.match(ask.hashes).items()}
        if self.policy == "RR":
            route = round_robin(self.found, (self.turns[0], self.turns[1]), ask.num_prompt)
            self.turns = [each + 1 for each in self.turns]
        else:
            known = Known(
                costs=self.costs,
                held=held if self.policy != "LOAD" else {},
                draw=self.draw,
                ttft_s=self.ttft_target_s,
                tpot_s=self.tpot_target_s,
            )
            try:
                route = choose(self.policy, self.found, facts, known)
            except QueueTimeout:
                ask.refused = True
                return
        first = self.named[route.first.name]
        decode = self.named[route.decode.name] if route.decode is not None else None
        assert decode is None or isinstance(decode, Decode)
        told = ask.num_prompt - (
            held.get(first.name, 0) if self.policy in ("CAR", "SLO_AWARE") else 0
        )
        costs = self.costs[first.name]
        ahead = costs.tokens_ahead + told
        costs.enqueue(str(number), told)
        begins = max(now, first.free_at)
        lacks = ask.num_prompt - min(first.held(ask.hashes) * BLOCK, ask.num_prompt - 1)
        first.free_at = begins + first.speeds.prefill + lacks * first.speeds.token
        first.keep(ask.hashes, self.changes)
        self.after(
            first.free_at,
            lambda then: self.first_token(number, ask, first, decode, (now, ahead), then),
        )

    def first_token(
        self,
        number: int,
        ask: Ask,
        first: Prefill,
        decode: Decode | None,
        placed: tuple[float, float],
        now: float,
    ) -> None:
        """P is done; KV moves, D goes on."""
        ask.ttft_s = now - ask.at
        costs = self.costs[first.name]
        costs.dequeue(str(number))
        costs.observe_first_token(placed[1], now - placed[0])
        target = decode or first
        assert isinstance(target, Decode)
        lacks = 0 if decode is None else ask.num_prompt - decode.held(ask.hashes) * BLOCK
        target.keep(ask.hashes, self.changes)
        self.costs[target.name].decode(1)
        moved_s = lacks * target.speeds.kv_bytes / target.speeds.link
        self.after(now + moved_s, lambda then: self.decode(number, ask, target, now, then))

    def decode(self, number: int, ask: Ask, target: Decode, first_at: float, now: float) -> None:
        """It joins the others."""
        target.advance(now)
        target.left[number] = ask.num_answer - 1
        self.next_end(target, now, {number: (ask, first_at)})

    def next_end(self, target: Decode, now: float, fresh: dict[int, tuple[Ask, float]]) -> None:
        """Look again when the next one ends."""
        self.known.update(fresh)
        if target.left:
            version = target.version
            at = now + max(0.0, min(target.left.values())) * target.pace()
            self.after(at, lambda then: self.ended(target, version, then))

    def ended(self, target: Decode, version: int, now: float) -> None:
        """Some are done."""
        if version != target.version:
            return
        target.advance(now)
        for number in [number for number, left in target.left.items() if left <= 1e-6]:
            ask, first_at = self.known.pop(number)
            del target.left[number]
            ask.tpot_s = (now - first_at) / max(1, ask.num_answer - 1)
            self.costs[target.name].observe_token(ask.tpot_s)
            self.costs[target.name].decode(-1)
        self.next_end(target, now, {})


def candidate(name: str, is_prefill: bool) -> Candidate:
    """Its card."""
    card = Card(
        name=name,
        rpc_address=f"{name}:1",
        type=(Role.PREFILL if is_prefill else Role.DECODE).value,
        incarnation_id=name,
        block_size=BLOCK,
        max_seqs=64,
        kv_token_bytes=131_072,
        enable_prefix_cache=True,
    )
    return Candidate(card=card, ready=True, alive_s=100.0)


def traffic(count: int, rate: float, seed: int) -> list[Ask]:
    """Bursty arrivals of prompts with shared beginnings."""
    rng = random.Random(seed)
    prefixes = [
        [rng.randbytes(16) for _ in range(1 + int(rng.lognormvariate(2.6, 0.6)))]
        for _ in range(400)
    ]
    weights = [1 / (rank + 1) for rank in range(len(prefixes))]
    at, asks = 0.0, []
    for _ in range(count):
        at += rng.gammavariate(1 / 9, 9 / rate)
        tail = 1 + int(rng.lognormvariate(0.8, 0.8))
        shared = rng.choices(prefixes, weights)[0]
        hashes = [*shared, *(rng.randbytes(16) for _ in range(tail))]
        answer = max(2, int(rng.lognormvariate(4.8, 0.7)))
        asks.append(Ask(at, hashes, len(hashes) * BLOCK + rng.randrange(1, BLOCK), answer))
    return asks


def simulate(policy: str, options: argparse.Namespace, instances: int, load: float) -> list[Ask]:
    """All requests, with their times."""
    speeds = Speeds(
        prefill=options.prefill_ms / 1e3,
        token=options.token_us / 1e6,
        step=options.step_ms / 1e3,
        row=options.row_us / 1e6,
    )
    half = instances // 2
    sample = traffic(2000, 1.0, options.seed)
    mean = sum(speeds.prefill + ask.num_prompt * speeds.token for ask in sample) / len(sample)
    asks = traffic(options.requests, load * half / mean, options.seed)
    simulation = Simulation(
        policy=policy,
        prefills=[Prefill(f"p{n}", speeds, options.cache_blocks) for n in range(half)],
        decodes=[Decode(f"d{n}", speeds, options.cache_blocks) for n in range(half)],
        ttft_target_s=options.ttft_ms / 1e3,
        tpot_target_s=options.tpot_ms / 1e3,
    )
    simulation.run(asks)
    return asks


def mean_ttft(asks: list[Ask]) -> float:
    """Milliseconds, over all."""
    return 1000 * sum(ask.ttft_s for ask in asks) / len(asks)


def goodput(asks: list[Ask], options: argparse.Namespace) -> float:
    """Requests a second that kept both targets."""
    kept = sum(
        ask.ttft_s <= options.ttft_ms / 1e3 and ask.tpot_s <= options.tpot_ms / 1e3 for ask in asks
    )
    return kept / asks[-1].at


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", default=["ttft", "goodput"])
    parser.add_argument("--instances", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.9])
    parser.add_argument("--overloads", type=float, nargs="+", default=[1.6, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill-ms", type=float, default=8.0)
    parser.add_argument("--token-us", type=float, default=60.0)
    parser.add_argument("--step-ms", type=float, default=12.0)
    parser.add_argument("--row-us", type=float, default=250.0)
    parser.add_argument("--cache-blocks", type=int, default=1500)
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tpot-ms", type=float, default=30.0)
    options = parser.parse_args()
    settings = {"requests": options.requests, "seed": options.seed}
    for instances in options.instances:
        if "ttft" in options.part:
            for load in options.loads:
                means = {
                    policy: round(mean_ttft(simulate(policy, options, instances, load)), 1)
                    for policy in ("RR", "LOAD", "CAR")
                }
                ratio = round(means["RR"] / means["CAR"], 2)
                emit(
                    "mean ttft",
                    {**settings, "instances": instances, "offered": load},
                    {**means, "ratio": ratio, "kept": ratio >= 1.5},
                )
        if "goodput" in options.part:
            for load in options.overloads:
                kept = {
                    policy: round(goodput(simulate(policy, options, instances, load), options), 2)
                    for policy in ("RR", "LOAD", "CAR", "SLO_AWARE")
                }
                ratio = round(kept["SLO_AWARE"] / kept["LOAD"], 2)
                emit(
                    "goodput",
                    {**settings, "instances": instances, "offered": load},
                    {**kept, "ratio": ratio, "kept": ratio >= 1.3},
                )


if __name__ == "__main__":
    main()
