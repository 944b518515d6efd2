"""The suites of devices, models and handoffs on a simulated npu, in a process of their own: it is registered once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import SIMULATED

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(SIMULATED, reason="this is the process that is started here")

SUITES = {
    "operators": ["tests/device/npu/operators.py"],
    "device": ["tests/conformance/test_device.py"],
    # every layer there is: head norms, biases, tied embeddings, experts, sliding windows
    "models": ["tests/conformance/test_models.py", "-k", "transformers and not greedy"],
    "handoff": [
        "tests/engine/test_pd_exactness.py",
        "-k",
        "two_engines and bfloat16-10240",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_it_holds_on_a_simulated_npu(suite: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *SUITES[suite]],
        cwd=ROOT,
        env={**os.environ, "XLLM_SIMULATE_NPU": "2"},
        capture_output=True,
        text=True,
        timeout=115,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
