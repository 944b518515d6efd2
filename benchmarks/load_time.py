"""How long loading a checkpoint takes beyond reading its file: a file of Qwen2-0.5B's shape, from disk and from the kernel's cache of it.

    python -m benchmarks.load_time [--rounds 5] [--shape 0.5b]

From disk: the kernel is asked to forget the file before each. Rounds take turns; the two threads of an instance pack what is read.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.models import write_model, write_weights
from benchmarks.report import emit, summary
from xllm_py.device import open_device
from xllm_py.model import load_model, open_weights, read_config

_PIECE = 8 << 20


def forget(path: Path) -> None:
    """Out of the kernel's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    """All of it, in order."""
    piece = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def load(folder: Path) -> None:
    """As an instance does."""
    device = open_device("cpu:0", threads=2)
    weights = open_weights(folder, torch.bfloat16, "auto")
    load_model(read_config(folder), device, weights, max_position=512)


def timed(act: Callable[[Path], None], path: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    act(path)
    return time.perf_counter() - began


def main() -> None:
    """One line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="0.5b")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"read_s": [], "load_s": [], "cached_s": [], "load_of_read": []}
    with tempfile.TemporaryDirectory() as parent:
        folder = write_model(Path(parent) / "model", options.shape)
        write_weights(folder, options.shape)
        (file,) = folder.glob("*.safetensors")
        load(folder)  # what is built at first use is built
        for _ in range(options.rounds):
            forget(file)
            reading = timed(read, file)
            forget(file)
            loading = timed(load, folder)
            found["read_s"].append(reading)
            found["load_s"].append(loading)
            found["load_of_read"].append(loading / reading)
            found["cached_s"].append(timed(load, folder))
    figures = {name: summary(values) for name, values in found.items()}
    kept = figures["load_of_read"]["median"] <= 1.3
    emit("loading a checkpoint", {"shape": options.shape}, {**figures, "kept": kept})


if __name__ == "__main__":
    main()
