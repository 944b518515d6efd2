"""Opening the real executor: what is refused, how the cache is sized, and a row that fails alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from xllm_py.base.errors import DeviceUnavailable, ModelLoadError, UsageError
from xllm_py.base.hashing import APPROXIMATE
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.executor import Executor
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # parts, layers, KV heads, head_dim, float32, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), with_tokenizer=True)


def opened(folder: Path, cache_bytes: int = 64 * BLOCK_BYTES, **fields: Any) -> Executor:
    cache = CacheConfig(block_size=16, max_cache_bytes=cache_bytes)
    return open_executor(EngineConfig(model_path=str(folder), cpu_threads=1, cache=cache, **fields))


def test_the_cache_takes_what_it_was_given_and_says_so(folder: Path) -> None:
    executor = opened(folder, 10 * BLOCK_BYTES + BLOCK_BYTES // 2)
    assert executor.capacity().num_blocks == executor.kv_memory().num_blocks == 10
    summary = " ".join(executor.capacity().summary)
    assert "10 blocks of 16 tokens" in summary
    assert "--max_cache_size" in summary
    assert "warning: less than one sequence of 2048 tokens" in summary
    executor.close()


def test_a_cache_larger_than_the_memory_is_cut_and_the_flag_that_did_it_is_named(
    folder: Path,
) -> None:
    cache = CacheConfig(block_size=16, max_cache_bytes=1 << 50, max_memory_utilization=1e-4)
    executor = open_executor(EngineConfig(model_path=str(folder), cpu_threads=1, cache=cache))
    assert executor.capacity().num_blocks < (1 << 50) // BLOCK_BYTES
    assert "cut to 0.0001 of the free memory by --max_memory_utilization" in " ".join(
        executor.capacity().summary
    )
    executor.close()


def test_a_cache_of_less_than_two_blocks_is_refused_with_the_flag_to_raise(folder: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="raise --max_cache_size or lower --block_size"):
        opened(folder, 2 * BLOCK_BYTES - 1)


def test_ranks_that_cannot_share_the_model_are_refused_before_any_is_started(folder: Path) -> None:
    with pytest.raises(UsageError, match="3 ranks cannot share out"):
        opened(folder, devices=("cpu:0", "cpu:1", "cpu:2"))


def test_two_ranks_compute_and_end_with_their_executor(folder: Path) -> None:
    before = psutil.Process().children()
    executor = opened(folder, devices=("cpu:0", "cpu:1"))
    children = [each for each in psutil.Process().children() if each not in before]
    assert len(children) == 1
    assert executor.capacity().device == "cpu:0,cpu:1"
    assert executor.capacity().numerics_fingerprint not in ("", APPROXIMATE)
    executor.close()
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_length_beyond_the_models_is_refused_and_a_shorter_one_holds(folder: Path) -> None:
    with pytest.raises(UsageError, match="--max_model_len=2049 is more than the model's 2048"):
        opened(folder, max_model_len=2049)
    executor = opened(folder, max_model_len=100)
    assert executor.capacity().facts.max_model_len == 100
    executor.close()


def test_a_missing_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        opened(tmp_path / "nowhere")


def plan(step: int, rows: dict[int, list[int]], *, started: bool, temperature: float) -> StepPlan:
    """One whole prompt per row, in the four blocks of that row; started False: the last token again."""
    starts = [
        RowStart(
            row=row,
            request_id=f"r{row}",
            block_ids=tuple(range(4 * row, 4 * row + 4)),
            sampling=SamplingParams(
                max_tokens=9, temperature=temperature, top_p=0.9, top_k=5, seed=1
            ),
        )
        for row in rows
    ]
    counts = [len(ids) if started else 1 for ids in rows.values()]
    return StepPlan(
        step=step,
        started=tuple(starts) if started else (),
        rows=list(rows),
        num_tokens=counts,
        num_computed=[len(ids) - count for ids, count in zip(rows.values(), counts, strict=True)],
        token_ids=[
            token
            for ids, count in zip(rows.values(), counts, strict=True)
            for token in ids[len(ids) - count :]
        ],
        sample=[1] * len(rows),
        positions=[0] * len(rows),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_numbers_are_no_numbers_fails_alone(folder: Path, temperature: float) -> None:
    executor = opened(folder)
    rows = {0: [1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}
    executor.execute(plan(1, rows, started=True, temperature=temperature))
    whole = executor.execute(plan(2, rows, started=False, temperature=temperature))
    assert not whole.failed_rows
    span = executor.kv_memory().span(1, 1, 4)  # row 1's first block holds nan now
    span[:] = b"\xff" * span.nbytes
    spoiled = executor.execute(plan(3, rows, started=False, temperature=temperature))
    assert list(spoiled.failed_rows) == [1]
    assert "not finite" in spoiled.failed_rows[1]
    assert spoiled.token_ids == [whole.token_ids[0], -1, whole.token_ids[2]]
    executor.close()


def test_a_row_that_was_never_started_is_an_error_of_ours(folder: Path) -> None:
    executor = opened(folder)
    with pytest.raises(ValueError, match="row 3"):
        executor.execute(plan(1, {3: [1, 2]}, started=False, temperature=0.0))
    executor.close()
