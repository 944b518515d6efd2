"""What does a client see: time to first token, per token, to the end, and how much gets through?

    python -m benchmarks.front_door [--clients 1 8] [--prompt-tokens 128] [--output-tokens 64] [--rounds 5] [--shape tiny]
    python -m benchmarks.front_door --url http://127.0.0.1:8000 [--model NAME]

Without --url it starts a master (with the registry in it), one PREFILL, one DECODE and one DEFAULT instance, all of a random
checkpoint, and puts the same load on the master and on the DEFAULT instance, in turns: the ratio is taken within each round. Closed loop: each client sends its next request when it has its answer. Every answer must
have all its tokens and end with [DONE]. Then the master's resident memory after the load and the time it takes to start.

One JSON line per row. ttft: to the first text; tpot: (last text - first text) / (tokens - 1); itl: between two events with text;
e2e: to the end of the stream. Times in milliseconds, over all requests of all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.daemons import Daemon, Daemons, daemons
from benchmarks.load import Round, Target, Workload, run_closed
from benchmarks.models import SHAPES, write_model
from benchmarks.report import emit, summary
from benchmarks.serve import first_model
from benchmarks.service import latencies

MASTER_MB, MASTER_START_S = 120.0, 1.0
MASTER_STARTS = 5
CACHE_BYTES = 256 << 20


def rounds_of(
    targets: Sequence[Target], workload: Workload, clients: int, options: argparse.Namespace
) -> dict[str, list[Round]]:
    """The same load on every target, in turns, after a warm-up of each; other prompts in each round."""
    rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
    size = clients * options.requests

    async def load(target: Target, per_client: int, number: int) -> Round:
        return await run_closed(target, workload, clients, per_client, number * size)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for target in targets:
            runner.run(load(target, options.warm_up, options.rounds))
        for number in range(options.rounds):
            for target in targets:
                rounds[target.name].append(runner.run(load(target, options.requests, number)))
    return rounds


def figures_of(rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything a client sees of one target."""
    answers = [answer for each in rounds for answer in each.answers]
    return {
        "requests": len(answers),
        **latencies(answers),
        "requests_s": summary([each.requests_s for each in rounds]),
        "tokens_s": summary([each.tokens_s for each in rounds]),
    }


def ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, Any]:
    """Ours over theirs, within each round."""
    pairs = list(zip(ours, theirs, strict=True))

    def median(each: Round, what: str) -> float:
        return statistics.median(getattr(answer, what) for answer in each.answers)

    shares = {
        what: [median(a, what) / median(b, what) for a, b in pairs] for what in ("ttft", "tpot")
    }
    shares["tokens_s"] = [a.tokens_s / b.tokens_s for a, b in pairs]
    return {what: summary(values) for what, values in shares.items()}


def measure(
    targets: Sequence[Target], options: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """One row per number of clients and target, and one with the ratio when there are two."""
    workload = Workload(options.prompt_tokens, options.output_tokens, options.seed)
    for clients in options.clients:
        rounds = rounds_of(targets, workload, clients, options)
        load = {
            **settings,
            "clients": clients,
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "seed": workload.seed,
        }
        for target in targets:
            emit("serve", {"target": target.name, **load}, figures_of(rounds[target.name]))
        if len(targets) == 2:
            ours, theirs = (rounds[target.name] for target in targets)
            names = " / ".join(target.name for target in targets)
            emit("serve_ratio", {"ratio": names, **load}, ratios(ours, theirs))


@dataclass(frozen=True)
class Starts:
    """How long a master takes from exec until /health answers, and how much of that it computes."""

    seconds: list[float]
    cpu_seconds: list[float]


def start_master(started: Daemons, times: int) -> tuple[Daemon, Starts]:
    """Start it so often; the last one stays."""
    starts = Starts([], [])
    while True:
        began = time.perf_counter()
        master = started.start_master()
        master.wait("/health", every_s=0.002)
        starts.seconds.append(time.perf_counter() - began)
        used = psutil.Process(master.process.pid).cpu_times()
        starts.cpu_seconds.append(used.user + used.system)
        if len(starts.seconds) >= times:
            return master, starts
        started.stop()


def emit_master(master: Daemon, starts: Starts, settings: dict[str, Any]) -> None:
    """Memory after the load, with that of its template child apart, and the start."""
    process = psutil.Process(master.process.pid)
    resident = process.memory_info().rss / 1e6
    children = sum(child.memory_info().rss for child in process.children(recursive=True)) / 1e6
    start = summary(starts.seconds)
    results = {
        "resident_mb": round(resident, 1),
        "children_mb": round(children, 1),
        "most_mb": MASTER_MB,
        "start_s": start,
        "start_cpu_s": summary(starts.cpu_seconds),
        "most_start_s": MASTER_START_S,
        "kept": resident <= MASTER_MB and start["median"] < MASTER_START_S,
    }
    emit("serve_master", settings, results)


@contextlib.contextmanager
def cluster(options: argparse.Namespace) -> Iterator[tuple[Daemon, Daemon, Starts]]:
    """The master, the DEFAULT instance and how the master started; everything is ready."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(folder / options.shape, options.shape)
        with daemons(folder, model) as started:
            master, starts = start_master(started, MASTER_STARTS)
            flags = ["--load_format=dummy", f"--max_cache_size={CACHE_BYTES}"]
            flags.append("--enable_prefix_cache=false")  # every prompt is computed in every round
            share = [*flags, f"--cpu_threads={options.threads}"]
            started.start_instance("PREFILL", share)
            started.start_instance("DECODE", share)
            whole = [*flags, f"--cpu_threads={options.default_threads or options.threads}"]
            lone = started.start_instance("DEFAULT", whole)
            for daemon in started.running:
                daemon.wait("/ready")
            yield master, lone, starts


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="measure this server and start nothing")
    parser.add_argument("--model", help="its model; without, the first it names")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--threads", type=int, default=1, help="of each instance")
    parser.add_argument(
        "--default-threads", type=int, default=0, help="of DEFAULT; 0: as --threads"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="per client and round")
    parser.add_argument(
        "--warm-up", type=int, default=2, help="requests per client that do not count"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure a given server, or the master and a DEFAULT instance."""
    options = parse()
    if options.url:
        model = options.model or first_model(options.url)
        measure([Target("url", options.url, model)], options, {"url": options.url})
        return
    with cluster(options) as (master, lone, starts):
        targets = [
            Target("master", master.url, options.shape),
            Target("default", lone.url, options.shape),
        ]
        settings = {
            "shape": options.shape,
            "threads": options.threads,
            "default_threads": options.default_threads or options.threads,
        }
        measure(targets, options, settings)
        emit_master(master, starts, settings)


if __name__ == "__main__":
    main()
