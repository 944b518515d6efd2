"""What a mixed batch costs: a step of 64 rows that ask for everything, against one of 64 greedy rows, in the same run.

A model's whole decode step with random weights. The rows ask in turn for greedy, temperature, top_p, top_k, penalties, bias, and five
log probabilities. One JSON line with the milliseconds of both steps and their ratio, which the engine keeps within 1.15.

    python -m benchmarks.sampling [--threads 2] [--rounds 7] [--shape 0.5b]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import config_of
from benchmarks.report import emit, summary
from benchmarks.steps import decode_ms
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.plan import RowStart
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor

ROWS = 64
CONTEXT = 127
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": tuple((token, 1.0) for token in range(50))},
    {"temperature": 0.0, "logprobs": 5},
)


def starts(mixed: bool) -> tuple[RowStart, ...]:
    """All rows, with a history of 128 tokens where it matters."""
    found = []
    for row in range(ROWS):
        asked = ASKED[row % len(ASKED)] if mixed else ASKED[0]
        sampling = SamplingParams(max_tokens=100, seed=row, **asked)
        history = tuple(range(CONTEXT)) if sampling.has_history else ()
        found.append(
            RowStart(
                row=row,
                request_id=str(row),
                block_ids=(row,),
                sampling=sampling,
                prompt_ids=history,
            )
        )
    return tuple(found)


def main() -> None:
    """Greedy and mixed steps in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", default="0.5b")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(options.shape)))
        executor = open_executor(
            EngineConfig(
                model_path=folder,
                load_format="dummy",
                cpu_threads=options.threads,
                cache=CacheConfig(block_size=128, max_cache_bytes=1 << 30),
                scheduler=SchedulerConfig(max_seqs_per_batch=ROWS),
            )
        )
        greedy, mixed = starts(mixed=False), starts(mixed=True)
        decode_ms(executor, greedy, 0, ROWS, CONTEXT)
        decode_ms(executor, mixed, 0, ROWS, CONTEXT)
        plain, asked, ratios = [], [], []
        for number in range(1, options.rounds + 1):
            plain.append(decode_ms(executor, greedy, number, ROWS, CONTEXT))
            asked.append(decode_ms(executor, mixed, number, ROWS, CONTEXT))
            ratios.append(asked[-1] / plain[-1])
    settings = {
        "shape": options.shape,
        "threads": options.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    figures = {"greedy_ms": summary(plain), "mixed_ms": summary(asked), "ratio": summary(ratios)}
    emit("mixed batch of 64 against greedy", settings, figures)


if __name__ == "__main__":
    main()
