"""One GPU against its own limits: decode at batch 1 and 32 as a share of the memory bandwidth, prefill of 2,048 tokens as a share of the matmul peak.

Also decode with steps begun ahead, and with tokens drawn (temperature 0.8, top_p 0.95). Random bfloat16 weights in Qwen2's shapes, exact kernels and
`--enable_deterministic=false` in turn, no HTTP. Bandwidth (a copy of 1 GiB: bytes read and written) and peak (a product of two 8,192-square matrices) are
measured in the same run. One JSON line per row. On `--device cpu:0` it runs too, for trying the script.

    python -m benchmarks.gpu [--device cuda:0] [--shape 0.5b 7b] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import config_of
from benchmarks.offline import open_engine, start, step
from benchmarks.report import emit
from xllm_py.core.plan import StepPlan
from xllm_py.engine.ranks import OneRank

CONTEXT = 512
PROMPT = 2048
BATCHES = (1, 32)
STEPS = 32  # begun ahead, one after the other
_BYTES = 2  # of a number


def timed(device: str, work: Callable[[], object], rounds: int) -> float:
    """Median seconds, each until the device is done."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    work()
    found = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def limits(device: str, rounds: int) -> tuple[float, float]:
    """(bytes a second, operations a second) of this device."""
    at, small = torch.device(device), not device.startswith("cuda")
    size = 1 << (26 if small else 30)
    source = torch.ones(size, dtype=torch.uint8, device=at)
    target = torch.empty_like(source)
    bandwidth = 2 * size / timed(device, lambda: target.copy_(source), rounds)
    side = 1024 if small else 8192
    square = torch.randn(side, side, device=at).to(torch.bfloat16)
    return bandwidth, 2 * side**3 / timed(device, lambda: square @ square, rounds)


def linear_numbers(shape: dict[str, Any]) -> tuple[int, int]:
    """(numbers of the layers' matrices, numbers of the head): each is read, and multiplied with, once a token."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head_dim
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner
    return shape["num_hidden_layers"] * layer, shape["vocab_size"] * hidden


def kv_bytes(shape: dict[str, Any]) -> int:
    """Of a token."""
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    heads = shape["num_key_value_heads"]
    return 2 * shape["num_hidden_layers"] * heads * head_dim * _BYTES


def measure(
    executor: OneRank, rows: int, count: int, computed: int, rounds: int, **asked: Any
) -> float:
    """Median seconds of a step of so many rows with so many tokens each."""
    names = list(range(rows))
    starts = tuple(start(row, computed + count + 1, **asked) for row in names)
    found = [
        step(executor, names, [count] * rows, [computed] * rows, starts) for _ in range(rounds + 2)
    ]
    return statistics.median(found[2:])  # the first compile


def measure_ahead(executor: OneRank, rows: int, rounds: int) -> float:
    """Median seconds of a step that is begun before the one before it is finished (--enable_schedule_overlap)."""
    names = list(range(rows))
    starts = tuple(start(row, CONTEXT + STEPS + 2) for row in names)
    found = []
    for _ in range(rounds + 2):
        step(executor, names, [1] * rows, [CONTEXT] * rows, starts)
        began, finish = time.perf_counter(), None
        for number in range(1, STEPS + 1):
            plan = StepPlan(
                step=number,
                rows=names,
                num_tokens=[1] * rows,
                num_computed=[CONTEXT + number] * rows,
                sample=[1] * rows,
                positions=[number] * rows,
                carried=True,
            )
            begun = executor.begin(plan)
            if finish is not None:
                finish()
            finish = begun
        assert finish is not None
        finish()
        found.append((time.perf_counter() - began) / STEPS)
    return statistics.median(found[2:])


def main() -> None:
    """Print one line per question."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", nargs="+", default=["0.5b", "7b"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bandwidth, peak = limits(options.device, options.rounds)
    found = {"gigabytes_s": bandwidth / 1e9, "teraflops": peak / 1e12}
    emit("limits", {"device": options.device}, found)
    for name in options.shape:
        for is_exact in (True, False):
            report(name, options.device, is_exact, (bandwidth, peak), options.rounds)


def report(name: str, device: str, is_exact: bool, limit: tuple[float, float], rounds: int) -> None:
    """All rows of one shape and one kind of products."""
    shape = config_of(name)
    layers, head = linear_numbers(shape)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        executor = open_engine(Path(folder), 0, device=device, is_exact=is_exact)
        common = {"shape": name, "device": executor.capacity().device, "exact": is_exact}
        for batch in BATCHES:
            seconds = measure(executor, batch, 1, CONTEXT, rounds)
            floor = ((layers + head) * _BYTES + batch * CONTEXT * kv_bytes(shape)) / limit[0]
            found = {"tokens_s": batch / seconds, "share_of_bandwidth": floor / seconds}
            emit(f"decode batch {batch}", common, found)
            ahead = measure_ahead(executor, batch, rounds)
            found = {"tokens_s": batch / ahead, "share_of_bandwidth": floor / ahead}
            emit(f"decode batch {batch}, begun ahead", common, found)
            drawn = measure(executor, batch, 1, CONTEXT, rounds, temperature=0.8, top_p=0.95)
            found = {"tokens_s": batch / drawn, "of_greedy": seconds / drawn}
            emit(f"decode batch {batch}, drawn", common, found)
        seconds = measure(executor, 1, PROMPT, 0, rounds)
        width = shape["hidden_size"]
        # causal attention: half of the square, products with keys and with values
        attention = 2 * shape["num_hidden_layers"] * PROMPT * PROMPT * width
        floor = (2 * layers * PROMPT + 2 * head + attention) / limit[1]
        found = {"tokens_s": PROMPT / seconds, "share_of_peak": floor / seconds}
        emit(f"prefill {PROMPT}", common, found)
        executor.close()


if __name__ == "__main__":
    main()
