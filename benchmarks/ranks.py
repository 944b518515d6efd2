"""What ranks cost and how fast their end is known, on the host's cpu.

python -m benchmarks.ranks [--rounds 5] [--part steps loss]

steps   the time of a decoding step of 8 sequences on 1, 2 and 4 ranks: two sums a layer and a plan told each step. A cpu has no use for ranks; this is what
        the collectives cost
loss    an instance of two ranks, idle, and one of them killed: until a master routes nothing there any more, at most 1 s; and until no process is left
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.daemons import Daemon, daemons
from benchmarks.models import write_model
from benchmarks.report import emit, summary
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor

SEQUENCES, BLOCK = 8, 16
CACHE = "--max_cache_size=16777216"  # a large one takes the kernel its time to free, and then whoever dies is seen later
STEPS = 50
LIMIT_S = 1.0


def step_ms(model: Path, count: int) -> float:
    """Median of a decoding step."""
    executor = open_executor(
        EngineConfig(
            model_path=str(model),
            load_format="dummy",
            devices=tuple(f"cpu:{n}" for n in range(count)),
            cpu_threads=1,
            cache=CacheConfig(block_size=BLOCK, max_cache_bytes=16 << 20),
            scheduler=SchedulerConfig(max_seqs_per_batch=SEQUENCES),
        )
    )
    greedy = SamplingParams(max_tokens=STEPS, temperature=0.0, seed=0)
    blocks = -(-STEPS // BLOCK) + 1
    started = tuple(
        RowStart(
            row=row,
            request_id=str(row),
            block_ids=tuple(range(row * blocks, (row + 1) * blocks)),
            sampling=greedy,
        )
        for row in range(SEQUENCES)
    )
    rows, seconds, tokens = list(range(SEQUENCES)), [], [1] * SEQUENCES
    for step in range(STEPS):
        plan = StepPlan(
            step=step,
            started=started if step == 0 else (),
            rows=rows,
            num_tokens=[1] * SEQUENCES,
            num_computed=[step] * SEQUENCES,
            token_ids=tokens,
            sample=[1] * SEQUENCES,
            positions=[step] * SEQUENCES,
        )
        began = time.perf_counter()
        tokens = executor.execute(plan).token_ids
        seconds.append(time.perf_counter() - began)
    executor.close()
    return 1000 * statistics.median(seconds[5:])


def steps(model: Path, rounds: int) -> None:
    """Rounds of all numbers in turn."""
    found: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(rounds):
        for count, samples in found.items():
            samples.append(step_ms(model, count))
    emit(
        "step of ranks",
        {"sequences": SEQUENCES, "model": model.name},
        {f"ms_{count}": summary(samples) for count, samples in found.items()},
    )


def routed(master: Daemon) -> bool:
    """Whether the master would send anybody there."""
    connection = http.client.HTTPConnection("127.0.0.1", master.port, timeout=5)
    try:
        connection.request("GET", "/admin/instances")
        rows = json.loads(connection.getresponse().read())["instances"]
    finally:
        connection.close()
    return any(row["state"] in ("READY", "SUSPECT") for row in rows)


def seconds_until(condition: Callable[[], bool]) -> float:
    """From now on."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > 30:
            raise SystemExit("waited 30 s")
        time.sleep(0.002)
    return time.perf_counter() - began


def loss(model: Path, folder: Path, rounds: int) -> None:
    """A new instance each round."""
    known, ended = [], []
    with daemons(folder, model) as started:
        master = started.start_master()
        master.wait("/health")
        for _ in range(rounds):
            flags = ["--load_format=dummy", "--devices=cpu:0,cpu:1", "--cpu_threads=1", CACHE]
            instance = started.start_instance("DEFAULT", flags, member=True)
            instance.wait("/ready")
            seconds_until(lambda: routed(master))
            every = [psutil.Process(instance.process.pid)]
            every += every[0].children(recursive=True)
            (rank,) = [each for each in every if each.parent() in every[1:]]
            os.kill(rank.pid, signal.SIGKILL)
            began = time.perf_counter()
            known.append(seconds_until(lambda: not routed(master)))
            instance.process.wait(30)
            psutil.wait_procs(every, timeout=30)
            ended.append(time.perf_counter() - began)
            started.running.remove(instance)
    found = {"unrouted_s": summary(known), "all_ended_s": summary(ended)}
    emit("loss of a rank", {"ranks": 2}, {**found, "kept": max(known) <= LIMIT_S})


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", nargs="+", default=["steps", "loss"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny", "tiny")
        if "steps" in options.part:
            steps(model, options.rounds)
        if "loss" in options.part:
            loss(model, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
