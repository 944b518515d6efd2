"""How much memory loading takes beyond what the loaded share of a model holds: a checkpoint of Qwen2-0.5B's shape, one rank of 1 and 2, each in a process of its own.

Anonymous memory is counted (the file's own pages are the kernel's cache): its peak while weights are read and packed, over what is held when that is done.

    python -m benchmarks.load_memory [--ranks 1 2] [--shape 0.5b]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from benchmarks.models import write_model, write_weights
from benchmarks.report import emit
from xllm_py.base.process import give_back_memory
from xllm_py.device import open_device
from xllm_py.model import load_model, open_weights, read_config
from xllm_py.model.sharding import Shard

_LOOK_S = 0.001
_STATUS = Path("/proc/self/status")


def held() -> int:
    """Anonymous bytes of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not tell RssAnon")


def load(folder: Path, rank: int, count: int) -> None:
    """Load one share and print what it took."""
    device = open_device("cpu:0", threads=2)
    config = read_config(folder)
    done = threading.Event()
    before = peak = held()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_LOOK_S):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(
        config,
        device,
        open_weights(folder, torch.bfloat16, "auto"),
        max_position=512,
        shard=Shard(rank=rank, count=count),
    )
    done.set()
    watcher.join()
    give_back_memory()
    share = held() - before
    del model
    print(json.dumps({"share": share, "peak": max(peak - before, share)}))


def main() -> None:
    """One line per number of ranks, of rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, rank, count = options.one
        load(Path(folder), int(rank), int(count))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", options.shape)
        write_weights(folder, options.shape)
        for count in options.ranks:
            command = [sys.executable, "-m", "benchmarks.load_memory", "--one", str(folder), "0"]
            done = subprocess.run([*command, str(count)], capture_output=True, check=True)
            found = json.loads(done.stdout)
            results = {
                "share_mib": found["share"] >> 20,
                "peak_mib": found["peak"] >> 20,
                "peak_over_share": round(found["peak"] / found["share"], 3),
            }
            emit(f"load one of {count}", {"shape": options.shape}, results)


if __name__ == "__main__":
    main()
