"""What cuda computes with, in Triton's interpreter and compiled, in processes of their own: which it is has to be chosen before Triton is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from tests.device.own_process import holds
from tests.devices import INTERPRETED, SIMULATED

pytestmark = [
    pytest.mark.skipif(INTERPRETED or SIMULATED, reason="this is a process that is started so"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here"),
]

SUITES = {
    "attention": ["tests/device/cuda/attention.py"],
    "draws": [
        "tests/conformance/test_device.py",
        "-k",
        "draws_the_same or (drawn and 513)",
    ],
    # at the sizes of tiles that a GPU has
    "device": [
        "tests/conformance/test_device.py",
        "-k",
        "(linear or gate or head_gives or norm or rotated or written or 8_bits or outside or layout or cache) and not 896 and not 4864",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_it_holds_in_the_interpreter(suite: str) -> None:
    holds(SUITES[suite], TRITON_INTERPRET="1")


@pytest.mark.slow
def test_every_kernel_compiles_for_the_gpu() -> None:
    holds(["tests/device/cuda/compiled.py"])
