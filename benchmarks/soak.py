"""Whether memory stays flat under load for long: a master, one PREFILL and one DECODE instance, every process of them.

    python -m benchmarks.soak [--minutes 60] [--shape tiny] [--clients 4] [--rest-s 0.5]

A closed loop in short rounds with a rest between, other prompts in each. Resident memory is read after each round; the first sixth of the time
is warm-up, then the mean of the next twelfth is held against that of the last. Every answer must be whole.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

from benchmarks.daemons import Daemons, daemons
from benchmarks.load import Target, Workload, run_closed
from benchmarks.models import write_model
from benchmarks.report import emit

EACH = 8  # requests of a client in a round
PROMPT, ANSWER = 96, 32
MOST = 0.02  # growth that still is flat


def processes(started: Daemons) -> dict[str, psutil.Process]:
    """All, engines too, by name."""
    found = {}
    for daemon in started.running:
        found[daemon.name] = process = psutil.Process(daemon.process.pid)
        for number, child in enumerate(process.children(recursive=True)):
            found[f"{daemon.name} child {number}"] = child
    return found


def main() -> None:
    """One line per process, one for the load."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rest-s", type=float, default=0.5)
    options = parser.parse_args()
    workload = Workload(PROMPT, ANSWER, 0)
    seen: dict[str, list[int]] = {}
    size = options.clients * EACH
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny", options.shape)
        with daemons(Path(folder), model) as started:
            flags = ["--load_format=dummy", "--block_size=32", "--cpu_threads=1"]
            master = started.start_master()
            for role in ("PREFILL", "DECODE"):
                started.start_instance(role, [*flags, "--max_cache_size=67108864"])
            master.wait("/ready")
            watched = processes(started)
            target = Target("master", master.url, "tiny")
            end, number = time.monotonic() + 60 * options.minutes, 0
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                while time.monotonic() < end:
                    runner.run(run_closed(target, workload, options.clients, EACH, number * size))
                    number += 1
                    for name, process in watched.items():
                        seen.setdefault(name, []).append(process.memory_info().rss)
                    time.sleep(options.rest_s)
    settings = {
        "minutes": options.minutes,
        "requests": number * size,
        "tokens": number * size * ANSWER,
    }
    for name, values in seen.items():
        part = max(1, len(values) // 12)
        first = statistics.mean(values[2 * part : 3 * part])
        last = statistics.mean(values[-part:])
        figures = {
            "first_mib": round(first / 2**20, 1),
            "last_mib": round(last / 2**20, 1),
            "growth": round(last / first - 1, 4),
            "kept": last / first - 1 <= MOST,
        }
        emit(f"memory of {name}", settings, figures)


if __name__ == "__main__":
    main()
