"""What a profile holds: every size that fits, timed, with the facts that a plan needs; and the command that writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.planner_sim import Costs
from tests.checkpoints import make_checkpoint
from xllm_py.base.clock import HandClock, RealClock
from xllm_py.base.errors import UsageError
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.engine.step_profile import write_profile
from xllm_py.engine.toy import ToyExecutor


def test_every_size_that_fits_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    config = EngineConfig(
        executor="toy",
        model_path="/models/some",
        profile_to=str(path),
        toy_step_s=0.001,
        toy_num_blocks=90,
        cache=CacheConfig(block_size=16),
    )
    executor = ToyExecutor(config)
    write_profile(executor, config, RealClock())
    found = json.loads(path.read_text())
    room = 89 * 16
    assert (found["model"], found["block_size"], found["num_blocks"]) == ("some", 16, 90)
    assert [tokens for tokens, context, _ in found["prefill"] if not context][-1] == 1024
    assert all(tokens + context <= room for tokens, context, _ in found["prefill"])
    assert [256, 512] in [row[:2] for row in found["prefill"]]
    assert [row[:2] for row in found["decode"]][:3] == [[1, 128], [2, 128], [4, 128]]
    assert all(seconds >= 0.001 for *_, seconds in found["prefill"] + found["decode"])
    assert Costs(found).step([(100, 0)], [50]) >= 0.001
    executor.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "steps.json"
    config = EngineConfig(executor="toy", profile_to=str(path), toy_num_blocks=4)
    executor = ToyExecutor(config)
    with pytest.raises(UsageError, match=r"nowhere/steps.json cannot be written"):
        write_profile(executor, config, HandClock())
    executor.close()


def test_the_command_writes_it_and_ends(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", with_tokenizer=True)
    command = [sys.executable, "-m", "xllm_py.cli.xllm", f"--model={model}", "--devices=cpu:0"]
    command += ["--profile_steps=steps.json", "--max_cache_size=4194304", "--cpu_threads=1"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "steps.json").read_text())
    assert (found["model"], found["num_layers"], found["threads"]) == ("model", 2, 1)
    assert found["prefill"]
    assert found["decode"]
