"""The master beside sglang-router over the same kind of instances: CPU per short request and per streamed event, requests a second.

    python -m benchmarks.router_beside [--router PATH] [--instances 2] [--rounds 5] [--requests 3200]

Both get text, which the master tokenises and the router (round robin) passes on; instances are toys that compute nothing. The router forwards
HTTP to the instances' own doors, so the work that the master does for them (tokenising, the token log, text from tokens) is done behind it: `all`
counts the instances' CPU too. Rounds take turns. pip install sglang-router; without it only the master is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.daemons import Daemon, Daemons, daemons, free_port
from benchmarks.load import Target, Workload
from benchmarks.master_overhead import (
    ANSWER,
    SHORT,
    STEP_S,
    STREAMS,
    TOY,
    cpu_s,
    load,
    start,
    whole_requests,
)
from benchmarks.models import write_model
from benchmarks.report import emit, summary

CHARACTERS, LETTERS = 128, "bcdefghijk"  # pairs of these are tokens that toy instances know


class Texts(Workload):
    """Prompts as texts, which the router wants."""

    def body(self, model: str, number: int) -> dict[str, Any]:
        """See Workload."""
        text = "".join(random.Random(number).choices(LETTERS, k=CHARACTERS))
        return {**super().body(model, number), "prompt": text}


def start_router(started: Daemons, router: str, step_s: float, instances: int) -> list[Daemon]:
    """It and its instances, which know nothing of it."""
    flags = ["--block_size=16", "--max_seqs_per_batch=8192", "--max_queue_size=100000"]
    flags.append("--max_concurrent_requests=100000")
    toys = [
        started.start_instance("DEFAULT", flags, program=f"{TOY} {step_s}")
        for _ in range(instances)
    ]
    for toy in toys:
        toy.wait("/ready")
    port = free_port()
    words = [router, "launch", "--worker-urls", *[toy.url for toy in toys]]
    words += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    words += ["--log-level", "warn", "--prometheus-port", str(free_port())]
    router_daemon = started.start_other("sglang-router", words, port)
    router_daemon.wait("/health", every_s=0.1)
    return [router_daemon, *toys]


def measure(door: list[Daemon], what: str, options: argparse.Namespace, turn: int) -> list[float]:
    """[rate, CPU us of the door, CPU us of all]; door: it and the instances behind it."""
    before = [cpu_s(each) for each in door]
    if what == "short":
        each = options.requests // SHORT
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rate = runner.run(whole_requests(door[0].url, Texts(0, 1, 0), SHORT, each))
        count = SHORT * each
    else:
        target = Target(door[0].name, door[0].url, "tiny")
        told = load(target, Texts(0, ANSWER, 0), STREAMS, 2, 2 * turn * STREAMS)
        rate, count = told.tokens_s, 2 * STREAMS * ANSWER
    used = [cpu_s(each) - begin for each, begin in zip(door, before, strict=True)]
    return [rate, 1e6 * used[0] / count, 1e6 * sum(used) / count]


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default=shutil.which("sglang-router") or "")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3200, help="of one round of short ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny", "tiny")
        for what, step_s in (("short", 0.0), ("streams", STEP_S)):
            with daemons(Path(folder), model) as started:
                master, *_ = start(started, options.instances, step_s, "RR")
                doors = {
                    "master": [master, *[each for each in started.running if each is not master]]
                }
                if options.router:
                    doors["sglang-router"] = start_router(
                        started, options.router, step_s, options.instances
                    )
                found: dict[str, list[list[float]]] = {name: [] for name in doors}
                for turn in range(options.rounds + 1):
                    for name, door in doors.items():
                        told = measure(door, what, options, turn)
                        if turn:  # the first warms up
                            found[name].append(told)
                for name, rounds in found.items():
                    rate, own, every = (summary(list(each)) for each in zip(*rounds, strict=True))
                    figures = {"per_s": rate, "cpu_us": own, "cpu_us_all": every}
                    emit(f"{what} beside a router", {"door": name}, figures)


if __name__ == "__main__":
    main()
