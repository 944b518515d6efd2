"""What best_of costs through prefill and decode: one request with best_of 8 against 8 greedy requests at once, with the same prompt.

Through a master of one PREFILL and one DECODE. The prompt's KV is shipped once, which the bytes D received show, and stored once: the
other choices fork from it. Every round has a prompt of its own, and so has each of the greedy ones' rounds. Floor: 1.25.

    python -m benchmarks.best_of [--shape 0.5b] [--prompt 512] [--tokens 64] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.daemons import Daemon, daemons
from benchmarks.models import SHAPES, write_model
from benchmarks.report import emit, summary

CHOICES = 8
MOST_RATIO = 1.25
CACHE_BYTES = 512 << 20


def ask(daemon: Daemon, method: str, path: str, body: Any = None) -> Any:
    """One answer as a value."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=300.0)
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {answer}")
    return answer


def ledger(decode: Daemon) -> dict[str, int]:
    """Bytes received and choices forked so far."""
    counts = ask(decode, "GET", "/debug/ledger")
    return {name: int(counts[name]) for name in ("kv_bytes_received", "forked_choices")}


def main() -> None:
    """The two kinds in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    chooser = random.Random(0)
    seconds: dict[str, list[float]] = {"best_of": [], "greedy": []}
    shipped: dict[str, list[int]] = {"best_of": [], "greedy": []}
    forked = 0
    with tempfile.TemporaryDirectory() as place:
        model = write_model(Path(place) / options.shape, options.shape)
        with daemons(Path(place), model) as started:
            flags = ["--load_format=dummy", f"--max_cache_size={CACHE_BYTES}"]
            flags += [f"--cpu_threads={options.threads}", "--debug_endpoints=true"]
            master = started.start_master()
            _, decode = (started.start_instance(role, flags) for role in ("PREFILL", "DECODE"))
            for daemon in started.running:
                daemon.wait("/ready")
            for number in range(options.rounds + 1):
                for kind in seconds:
                    prompt = [chooser.randrange(1000) for _ in range(options.prompt)]
                    body = {"model": model.name, "prompt": prompt, "max_tokens": options.tokens}
                    body |= {"ignore_eos": True, "temperature": 0.0}
                    bodies = [body] * CHOICES
                    if kind == "best_of":
                        bodies = [{**body, "temperature": 0.8, "seed": 1, "best_of": CHOICES}]
                    before, began = ledger(decode), time.perf_counter()
                    with ThreadPoolExecutor(CHOICES) as clients:
                        post = (master, "POST", "/v1/completions")
                        list(clients.map(lambda each, post=post: ask(*post, each), bodies))
                    spent, after = time.perf_counter() - began, ledger(decode)
                    if number:
                        seconds[kind].append(spent)
                        received = after["kv_bytes_received"] - before["kv_bytes_received"]
                        shipped[kind].append(received)
                        forked += after["forked_choices"] - before["forked_choices"]
    ratio = statistics.median(seconds["best_of"]) / statistics.median(seconds["greedy"])
    results: dict[str, Any] = {
        "best_of_s": summary(seconds["best_of"]),
        "greedy_s": summary(seconds["greedy"]),
        "ratio": round(ratio, 3),
        "kept": ratio <= MOST_RATIO,
        "kv_bytes_best_of": statistics.median(shipped["best_of"]),
        "kv_bytes_greedy": statistics.median(shipped["greedy"]),
        "forked_choices": forked,
    }
    emit("best_of 8 through PD", vars(options), results)


if __name__ == "__main__":
    main()
