"""What the master costs: CPU per request and per event, how many it bears, what it adds, and what an open stream weighs.

    python -m benchmarks.master_overhead [--instances 2] [--rounds 5] [--policy RR] [--part short streams idle]

Toy instances compute nothing (a step sleeps), so the machine is the master's and the client's; both run here, and only the master's CPU seconds
are counted. Every answer must be whole.

    short    32 clients in a closed loop, 64 prompt tokens, one answered, not streamed:
             master CPU <= 230 us a request, >= 3,900 requests/s, both sglang-router's best rows (PERF)
    streams  64 streams of a token each 10 ms, 6,400 events/s: CPU <= 16 us an event; delay of an event: time between two of one stream beyond
             the same at the instance itself, p50 <= 1 ms, p99 <= 5 ms
    idle     5,000 open streams that wait: resident memory of the master, <= 15 KB each
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.daemons import Daemon, Daemons, daemons
from benchmarks.http_stream import connect, encode
from benchmarks.load import Round, Target, Workload, run_closed
from benchmarks.models import write_model
from benchmarks.report import emit, percentile, summary

TOY = "benchmarks.toy_instance"
SHORT, STREAMS, IDLE = 32, 64, 5000
STEP_S = 0.01
ANSWER = 128


def cpu_s(daemon: Daemon) -> float:
    """CPU seconds of the process so far."""
    used = psutil.Process(daemon.process.pid).cpu_times()
    return used.user + used.system


def start(started: Daemons, instances: int, step_s: float, policy: str) -> tuple[Daemon, Daemon]:
    """A master with toy instances behind it; it and one of them."""
    master = started.start_master(f"--load_balance_policy={policy}", "--max_queue_size=100000")
    flags = ["--block_size=16", "--max_seqs_per_batch=8192", "--max_queue_size=100000"]
    toys = [
        started.start_instance("DEFAULT", flags, member=True, program=f"{TOY} {step_s}")
        for _ in range(instances)
    ]
    for daemon in (*toys, master):
        daemon.wait("/ready")
    return master, toys[0]


def load(target: Target, workload: Workload, clients: int, each: int, first: int) -> Round:
    """A closed loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_closed(target, workload, clients, each, first))


async def whole_requests(url: str, workload: Workload, clients: int, each: int) -> float:
    """Requests per second of answers that come in one piece."""
    bodies = [
        encode(
            url,
            "/v1/completions",
            {**workload.body("tiny", n), "stream": False, "stream_options": None},
        )
        for n in range(clients * each)
    ]

    async def ask(own: list[bytes]) -> None:
        connection = await connect(url)
        for body in own:
            if not connection.usable:
                connection = await connect(url)
            stream = await connection.post(body)
            if stream.status != 200:
                raise SystemExit(f"an answer of status {stream.status} from {url}")
        connection.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for client in range(clients):
            group.create_task(ask(bodies[client::clients]))
    return clients * each / (time.perf_counter() - began)


def short(master: Daemon, options: argparse.Namespace) -> None:
    """Requests of one token."""
    workload = Workload(64, 1, options.seed)
    rates, costs = [], []
    each = options.requests // SHORT
    for turn in range(options.rounds + 1):
        before = cpu_s(master)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rate = runner.run(whole_requests(master.url, workload, SHORT, each))
        if turn:  # the first warms up
            rates.append(rate)
            costs.append(1e6 * (cpu_s(master) - before) / (SHORT * each))
    figures = {"requests_s": summary(rates), "cpu_us": summary(costs)}
    kept = {
        "cpu_kept": figures["cpu_us"]["median"] <= 230,
        "rate_kept": figures["requests_s"]["median"] >= 3900,
    }
    emit("short requests", {"clients": SHORT, "policy": options.policy}, {**figures, **kept})


def gaps_ms(answers: Round) -> list[float]:
    """Between two events of a stream."""
    return [1000 * gap for answer in answers.answers for gap in answer.gaps]


def streams(master: Daemon, toy: Daemon, options: argparse.Namespace) -> None:
    """Tokens at the pace of toy instances, through the master and straight."""
    workload = Workload(64, ANSWER, options.seed)
    costs, rates, through, straight = [], [], [], []
    for turn in range(options.rounds + 1):
        before = cpu_s(master)
        ours = load(Target("master", master.url, "tiny"), workload, STREAMS, 2, 2 * turn * STREAMS)
        used = cpu_s(master) - before
        theirs = load(Target("instance", toy.url, "tiny"), workload, STREAMS, 2, 2 * turn * STREAMS)
        if turn:
            costs.append(1e6 * used / (2 * STREAMS * ANSWER))
            rates.append(ours.tokens_s)
            through += gaps_ms(ours)
            straight += gaps_ms(theirs)
    delay = {
        f"p{round(100 * share)}_ms": round(
            percentile(through, share) - percentile(straight, share), 3
        )
        for share in (0.5, 0.99)
    }
    figures: dict[str, Any] = {"events_s": summary(rates), "cpu_us": summary(costs), "added": delay}
    kept = {
        "cpu_kept": figures["cpu_us"]["median"] <= 16,
        "delay_kept": delay["p50_ms"] <= 1 and delay["p99_ms"] <= 5,
    }
    emit("streams", {"streams": STREAMS, "policy": options.policy}, {**figures, **kept})


async def hold_open(url: str, count: int, resident: Any) -> float:
    """Bytes of resident memory for each of so many streams that have said their first token and wait."""
    body = {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "max_tokens": 12,
        "stream": True,
        "ignore_eos": True,
    }
    raw = encode(url, "/v1/completions", body)
    host, _, port = url.removeprefix("http://").partition(":")
    before = resident()
    streams = []
    for begin in range(0, count, 200):
        opened = await asyncio.gather(
            *(asyncio.open_connection(host, int(port)) for _ in range(min(200, count - begin)))
        )
        for _, writer in opened:
            writer.write(raw)
        streams += opened
    await asyncio.gather(*(reader.readuntil(b"data: ") for reader, _ in streams))
    used = (resident() - before) / count
    for _, writer in streams:
        writer.close()
    return float(used)


def idle(master: Daemon, options: argparse.Namespace) -> None:
    """Open streams between two tokens."""
    process = psutil.Process(master.process.pid)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        used = runner.run(hold_open(master.url, IDLE, lambda: process.memory_info().rss))
    kilobytes = round(used / 1000, 1)
    emit("open streams", {"streams": IDLE}, {"kilobytes": kilobytes, "kept": kilobytes <= 15})


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", default=["short", "streams", "idle"])
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=6400, help="of one round of `short`")
    parser.add_argument("--policy", default="RR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny", "tiny")
        for part, step_s in (("short", 0.0), ("streams", STEP_S), ("idle", 3.0)):
            if part not in options.part:
                continue
            with daemons(Path(folder), model) as started:
                master, toy = start(started, options.instances, step_s, options.policy)
                match part:
                    case "short":
                        short(master, options)
                    case "streams":
                        streams(master, toy, options)
                    case _:
                        idle(master, options)


if __name__ == "__main__":
    main()
