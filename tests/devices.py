"""Which device the suites compute on: cpu, and in a process of its own (XLLM_SIMULATE_NPU=2) the simulated npu and nothing else, or
(TRITON_INTERPRET=1) what cuda computes with, in Triton's interpreter.
"""

from __future__ import annotations

import os

SIMULATED = bool(os.environ.get("XLLM_SIMULATE_NPU"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "npu:1" if SIMULATED else "cpu:0"
BLOCK_SIZE = 128 if SIMULATED else 16  # an npu takes no smaller blocks
