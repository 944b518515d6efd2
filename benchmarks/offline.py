"""How fast one instance computes: prefill tokens per second at 512 and 2,048, decode at batch 1, 8 and 32 (context 512).

Qwen2-0.5B's shape with random bfloat16 weights, exact mode, no HTTP and no processes around it. One JSON line per row, with the
limit that this machine's own products set (`limit`: all linears of the step alone, measured in the same run) and the share reached.

    python -m benchmarks.offline [--threads 2] [--rounds 5] [--quick] [--quantization w8a8]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import config_of
from benchmarks.report import emit, summary
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import OneRank, open_executor

SHAPE = config_of("0.5b")
CONTEXT = 512
VOCABULARY = 8_000
BLOCK = 128


def open_engine(
    folder: Path,
    threads: int,
    quantization: str = "",
    *,
    device: str = "cpu:0",
    is_exact: bool = True,
) -> OneRank:
    """The executor over dummy weights, for a folder with a config.json."""
    executor = open_executor(
        EngineConfig(
            model_path=str(folder),
            load_format="dummy",
            quantization=quantization,
            devices=(device,),
            is_exact=is_exact,
            cpu_threads=threads,
            cache=CacheConfig(block_size=BLOCK, max_cache_bytes=1 << 30),
            scheduler=SchedulerConfig(max_seqs_per_batch=32),
        )
    )
    assert isinstance(executor, OneRank)
    return executor


def start(row: int, tokens: int, **asked: Any) -> RowStart:
    """A row with blocks of its own; greedy, unless something else is asked."""
    count = -(-tokens // BLOCK)
    first = row * count
    blocks = tuple(range(first, first + count))
    return RowStart(
        row=row,
        request_id=str(row),
        block_ids=blocks,
        sampling=SamplingParams(**{"max_tokens": 1, "temperature": 0.0, "seed": 0, **asked}),
    )


def step(
    executor: OneRank,
    rows: list[int],
    counts: list[int],
    computed: list[int],
    starts: tuple[RowStart, ...],
) -> float:
    """One step; seconds. Token ids differ per position, and the answer is checked to be one."""
    ids = [
        (7919 * (c + i) + 31 * r) % VOCABULARY
        for r, n, c in zip(rows, counts, computed, strict=True)
        for i in range(n)
    ]
    plan = StepPlan(
        step=0,
        started=starts,
        rows=rows,
        num_tokens=counts,
        num_computed=computed,
        token_ids=ids,
        sample=[1] * len(rows),
        positions=[0] * len(rows),
    )
    began = time.perf_counter()
    result = executor.execute(plan)
    seconds = time.perf_counter() - began
    assert len(result.token_ids) == len(rows)
    assert not result.failed_rows
    return seconds


def linears_s(executor: OneRank, rows: int, heads: int) -> float:
    """All linears of a step with so many rows, alone: the floor under it."""
    model = executor.worker._model
    x = torch.randn(rows, SHAPE["hidden_size"], dtype=torch.bfloat16)
    began = time.perf_counter()
    for layer in model._layers:
        layer._attention._qkv(x)
        layer._attention._out(x, x)
        layer._feed(x, rows, x)
    model.logits(x[:heads])
    return time.perf_counter() - began


def main() -> None:
    """Print one line per question."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", choices=("", "w8a8"), default="")
    parser.add_argument("--quick", action="store_true", help="two rounds and no 2,048-token prompt")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        executor = open_engine(Path(folder), options.threads, options.quantization)
        settings: dict[str, Any] = {
            "shape": "Qwen2-0.5B",
            "dtype": "bfloat16",
            "quantization": options.quantization,
            "threads": options.threads,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "native_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        }
        for length in (512,) if options.quick else (512, 2048):
            measure(executor, f"prefill {length}", [0], [length], [0], rounds, settings)
        for batch in (1, 8, 32):
            rows = list(range(batch))
            counts, computed = [1] * batch, [CONTEXT] * batch
            measure(executor, f"decode batch {batch}", rows, counts, computed, rounds, settings)


def measure(
    executor: OneRank,
    what: str,
    rows: list[int],
    counts: list[int],
    computed: list[int],
    rounds: int,
    settings: dict[str, Any],
) -> None:
    """Warm up once, then alternate the step and its linears alone."""
    starts = tuple(start(row, computed[0] + counts[0] + 1) for row in rows)
    tokens = sum(counts)
    step(executor, rows, counts, computed, starts)
    steps, floors = [], []
    for _ in range(rounds):
        steps.append(step(executor, rows, counts, computed, starts))
        floors.append(linears_s(executor, tokens, len(rows)))
    speed = summary([tokens / seconds for seconds in steps])
    limit = summary([tokens / seconds for seconds in floors])
    share = float(f"{speed['median'] / limit['median']:.3g}")
    emit(what, settings, {"tokens_per_s": speed, "limit": limit, "share": share})


if __name__ == "__main__":
    main()
