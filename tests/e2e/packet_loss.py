"""A pair on a loopback that loses packets of its KV link: started by test_packet_loss inside a network namespace of its own.

    python -m tests.e2e.packet_loss MODEL FOLDER RATE...

For each rate, in [0, 1), the same number of requests; a JSON line each: status, text, and the text over a link that loses nothing.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import all_let_go, body, newest, serves_in_pairs
from tests.ports import free_port

REQUESTS = 6  # at each rate, two at a time
TOKENS = 200  # of a prompt: about 150 KiB of KV, a hundred packets


def prompt(seed: int) -> list[int]:
    """One that nobody has seen: what D has cached is not handed over."""
    return random.Random(seed).choices(range(300), k=TOKENS)


def run(*words: str) -> None:
    subprocess.run(words, check=True, timeout=10)


def lose(port: int, rate: float) -> None:
    """Packets to and from this port, in place of what was lost before."""
    run("iptables", "-F", "INPUT")
    for side in ("--dport", "--sport"):
        chance = ("-m", "statistic", "--mode", "random", "--probability", f"{rate:.3f}")
        run("iptables", "-A", "INPUT", "-p", "tcp", side, str(port), *chance, "-j", "DROP")


def serves(master: Daemon) -> bool:
    """Whether a request goes by both again."""
    status, _ = master.request("POST", "/v1/completions", body([7, 9]))
    return status == 200 and newest(master)["mode"] == "pd"


def main(model: Path, folder: Path, rates: list[float]) -> None:
    """Inside the namespace."""
    run("ip", "link", "set", "lo", "mtu", "1500", "up")
    port = free_port()
    with running(folder, model) as cluster:
        master = cluster.start_master("--queue_timeout_s=5")
        prefill = cluster.start_instance("prefill", "PREFILL", "--kv_streams=1")
        decode = cluster.start_instance(
            "decode", "DECODE", "--kv_streams=1", f"--transfer_listen_port={port}"
        )
        cluster.wait_ready()
        serves_in_pairs(master)
        for index, rate in enumerate(rates):
            seeds = range(100 * index, 100 * index + REQUESTS)
            lose(port, rate)
            answers = []
            for seed in seeds[::2]:
                asked = [Pending(master, body(prompt(each))) for each in (seed, seed + 1)]
                answers += [each.answer() for each in asked]
            run("iptables", "-F", "INPUT")
            wait_for("the pair to serve", lambda: serves(master))
            for seed, answer in zip(seeds, answers, strict=True):
                found = answer.body["choices"][0]["text"] if answer.status == 200 else ""
                _, expected = master.request("POST", "/v1/completions", body(prompt(seed)))
                line = {"rate": rate, "status": answer.status, "text": found}
                print(json.dumps({**line, "expected": expected["choices"][0]["text"]}), flush=True)
            all_let_go(master, prefill, decode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [float(each) for each in sys.argv[3:]])
