"""What a fresh interpreter has loaded after importing a program of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.arch.source import ROOT

TORCH = {"torch", "torch_npu", "safetensors", "transformers"}
GRPC = {"grpc", "google.protobuf"}


def loaded_after(importing: str) -> set[str]:
    """Names of all modules loaded in a child that runs `import <importing>`."""
    code = f"import sys, {importing}; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "xllm_py.master.daemon",
        "xllm_py.instance.daemon",
        "xllm_py.registry.embedded",
        "xllm_py.engine.__main__",
        "xllm_py.engine.toy",
    ],
)
def test_no_torch_is_loaded_by_importing(program: str) -> None:
    assert not loaded_after(program) & TORCH


@pytest.mark.parametrize("program", ["xllm_py.cli.xllm", "xllm_py.cli.xllm_master"])
def test_neither_torch_nor_grpc_is_loaded_by_importing_the_command_line(program: str) -> None:
    assert not loaded_after(program) & (TORCH | GRPC)


def test_the_rank_side_is_seen_to_load_torch() -> None:
    assert loaded_after("xllm_py.engine.worker") & TORCH
