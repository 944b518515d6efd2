"""What is paid beside the computation, in microseconds: finding a long prompt in the prefix cache, and the tensors of a step.

`match`: a prompt of 4,096 tokens that is all there, hashed anew, found and compared, as at admission; floor 200. `inputs`: from the
plan of 256 decoding rows (context 512) to the model's tensors; floor 300. One JSON line each, medians over rounds.

    python -m benchmarks.small_costs [--rounds 200]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.models import config_of
from benchmarks.report import emit, summary
from xllm_py.core.block_manager import BlockManager
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.prefix_cache import PrefixCache
from xllm_py.core.request import Request, State, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import OneRank, open_executor

BLOCK = 128
MATCH_TOKENS, MATCH_FLOOR_US = 4096, 200.0
ROWS, CONTEXT, INPUTS_FLOOR_US = 256, 512, 300.0


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds of each round, after ten that do not count."""
    samples = []
    for number in range(rounds + 10):
        began = time.perf_counter()
        work()
        if number >= 10:
            samples.append((time.perf_counter() - began) * 1e6)
    return samples


def request_of(tokens: list[int]) -> Request:
    """As admission makes it."""
    sampling = SamplingParams(max_tokens=8, seed=0)
    return Request(
        submission=Submission(request_id="r", prompt_ids=tuple(tokens), sampling=sampling),
        state=State.WAITING,
        deadline=1e9,
        tokens=list(tokens),
        num_prompt=len(tokens),
        num_submitted=len(tokens),
        max_len=len(tokens) + 8,
        stop_ids=frozenset(),
    )


def match(rounds: int) -> list[float]:
    """Of a prompt whose every block is published."""
    tokens = [(7919 * at) % 150_000 for at in range(MATCH_TOKENS)]
    blocks = BlockManager(2 * MATCH_TOKENS // BLOCK, BLOCK)
    prefix = PrefixCache(blocks, b"root")
    first = request_of(tokens)
    prefix.find(first, MATCH_TOKENS)
    first.block_ids = blocks.allocate(MATCH_TOKENS // BLOCK)
    prefix.begin(first, 0)
    first.num_computed = MATCH_TOKENS
    prefix.publish(first)
    waiting = [request_of(tokens) for _ in range(rounds + 10)]

    def find() -> None:
        assert len(prefix.find(waiting.pop(), MATCH_TOKENS)) == MATCH_TOKENS // BLOCK

    return timed(find, rounds)


def inputs(rounds: int) -> list[float]:
    """Of a step in which every row decodes one token."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of("tiny")))
        per_row = CONTEXT // BLOCK + 1
        executor = open_executor(
            EngineConfig(
                model_path=folder,
                load_format="dummy",
                cpu_threads=1,
                cache=CacheConfig(block_size=BLOCK, max_cache_bytes=2 << 30),
                scheduler=SchedulerConfig(max_seqs_per_batch=ROWS),
            )
        )
        assert isinstance(executor, OneRank)
        starts = tuple(
            RowStart(
                row=row,
                request_id=str(row),
                block_ids=tuple(range(per_row)),
                sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
            )
            for row in range(ROWS)
        )
        plan = StepPlan(
            step=1,
            started=starts,
            rows=list(range(ROWS)),
            num_tokens=[1] * ROWS,
            num_computed=[CONTEXT] * ROWS,
            token_ids=[5] * ROWS,
            sample=[1] * ROWS,
            positions=[0] * ROWS,
        )
        executor.worker._update_rows(plan)
        samples = timed(lambda: executor.worker._inputs(plan), rounds)
        executor.close()
    return samples


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    for what, measure, floor in (
        ("prefix match of 4,096 tokens", match, MATCH_FLOOR_US),
        ("inputs of 256 decoding rows", inputs, INPUTS_FLOOR_US),
    ):
        microseconds = summary(measure(options.rounds))
        kept = microseconds["median"] <= floor
        emit(what, {"block_size": BLOCK}, {"us": microseconds, "floor_us": floor, "kept": kept})


if __name__ == "__main__":
    main()
