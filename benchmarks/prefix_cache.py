"""What the prefix cache saves: time to the first token of prompts with one long prefix and a tail of their own each.

Asked one at a time of one DEFAULT instance, and through a master of one PREFILL and one DECODE; the same tails with the cache and
without, after one request that computed the prefix. Floor: with the cache at most 0.15 of without.

    python -m benchmarks.prefix_cache [--shape 0.5b] [--prefix 2048] [--tails 32] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.daemons import Daemon, Daemons, daemons
from benchmarks.load import Target, Workload, run_closed
from benchmarks.models import SHAPES, write_model
from benchmarks.report import emit, summary

MOST_SHARE = 0.15
CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class SharedPrefix(Workload):
    """Prompts that begin alike: the first `shared` tokens are those of prompt 0."""

    shared: int = 0

    def prompt(self, number: int) -> list[int]:
        """The common beginning, then tokens of its own."""
        return super().prompt(0)[: self.shared] + super().prompt(number)[self.shared :]


def received(decode: Daemon) -> int:
    """Bytes of KV that D has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", decode.port, timeout=30.0)
    connection.request("GET", "/debug/ledger")
    return int(json.loads(connection.getresponse().read())["kv_bytes_received"])


def first_tokens(target: Target, workload: Workload, tails: int) -> list[float]:
    """Seconds to the first token, one request after the other; the one that computes the prefix is not counted."""
    asyncio.run(run_closed(target, workload, 1, 1, 0))
    return [
        answer.ttft for answer in asyncio.run(run_closed(target, workload, 1, tails, 1)).answers
    ]


def measure(started: Daemons, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Times of both targets and the bytes shipped to D for each tail, with the cache on or off."""
    workload = SharedPrefix(options.prefix + options.tail, 2, options.seed, shared=options.prefix)
    flags = ["--load_format=dummy", f"--max_cache_size={CACHE_BYTES}", "--debug_endpoints=true"]
    flags += [f"--cpu_threads={options.threads}", f"--enable_prefix_cache={cache}"]
    master = started.start_master()
    _, decode, lone = (
        started.start_instance(role, flags) for role in ("PREFILL", "DECODE", "DEFAULT")
    )
    for daemon in started.running:
        daemon.wait("/ready")
    model = started.model.name
    times = {"default": first_tokens(Target("default", lone.url, model), workload, options.tails)}
    first_tokens(Target("master", master.url, model), workload, 1)
    before = received(decode)
    times["pd"] = first_tokens(Target("master", master.url, model), workload, options.tails)
    shipped = (received(decode) - before) / (options.tails + 1)
    started.stop()
    return {"times": times, "shipped": shipped}


def main() -> None:
    """One row for DEFAULT and one for PD."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--tail", type=int, default=16)
    parser.add_argument("--tails", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = write_model(Path(place) / options.shape, options.shape)
        with daemons(Path(place), model) as started:
            found = {cache: measure(started, options, cache) for cache in ("true", "false")}
    for mode in ("default", "pd"):
        ours, theirs = (found[cache]["times"][mode] for cache in ("true", "false"))
        share = statistics.median(ours) / statistics.median(theirs)
        results: dict[str, Any] = {
            "ttft_s": summary(ours),
            "ttft_without_s": summary(theirs),
            "share": round(share, 4),
            "kept": share <= MOST_SHARE,
        }
        if mode == "pd":
            results["kv_bytes_per_request"] = round(found["true"]["shipped"])
            results["kv_bytes_without"] = round(found["false"]["shipped"])
        emit("prefix_cache", {"mode": mode, **vars(options)}, results)


if __name__ == "__main__":
    main()
