"""The suites of devices, models and handoffs on a simulated npu, in a process of their own: it is registered once per process."""

from __future__ import annotations

import pytest

from tests.device.own_process import holds
from tests.devices import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="this is the process that is started here")

SUITES = {
    "operators": ["tests/device/npu/operators.py"],
    "device": ["tests/conformance/test_device.py"],
    # every layer there is: head norms, biases, tied embeddings, experts, sliding windows
    "models": ["tests/conformance/test_models.py", "-k", "transformers and not greedy"],
    # tokens that stay on the device from one step to the next, or are drawn from logits that do
    "ahead": ["tests/engine/test_exactness.py", "-k", "(ahead or drawn) and untied and bfloat16"],
    "handoff": [
        "tests/engine/test_pd_exactness.py",
        "-k",
        "two_engines and bfloat16-10240",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_it_holds_on_a_simulated_npu(suite: str) -> None:
    holds(SUITES[suite], XLLM_SIMULATE_NPU="2")
