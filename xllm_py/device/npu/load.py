"""Brings torch_npu in, or its stand-in, and says in one line what is wrong when it cannot."""

from __future__ import annotations

import os
from typing import Any

import torch

from xllm_py.base.errors import DeviceUnavailable

SIMULATE = "XLLM_SIMULATE_NPU"
_MOST_SIMULATED = 64


def load(name: str) -> Any:
    """The module with the operators; afterwards torch knows devices called `npu`. Raises DeviceUnavailable with cause and fix.

    name: of the device that is wanted, for the message.
    """
    wanted = os.environ.get(SIMULATE, "")
    if wanted:
        return _simulated(wanted)
    try:
        import torch_npu
    except ModuleNotFoundError as error:
        raise DeviceUnavailable(
            f"{name}: {error.name} is not installed. On an Ascend host install xllm_py[npu]; without one set "
            f"{SIMULATE}=2 to try what needs no speed, or pass --devices=cpu:0"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceUnavailable(
            f"{name}: torch_npu cannot be loaded ({_first_line(error)}). Source CANN's set_env.sh, and check that its version is of torch {torch.__version__}"
        ) from error
    return torch_npu


def _simulated(wanted: str) -> Any:
    from xllm_py.device.npu import simulated

    count = int(wanted) if wanted.isdecimal() else 0
    if not 1 <= count <= _MOST_SIMULATED:
        raise DeviceUnavailable(
            f"{SIMULATE}={wanted}: write how many, 1 to {_MOST_SIMULATED}, or unset it"
        )
    return simulated.install(count)


def choose(npu: Any, index: int) -> torch.device:
    """Make this NPU the one that is computed on; npu: torch.npu. Raises DeviceUnavailable with what is there."""
    count = npu.device_count()
    if count == 0:
        raise DeviceUnavailable(
            f"npu:{index}: torch_npu sees no NPU. Is the driver loaded (npu-smi info), and is /dev/davinci* mapped into the container?"
        )
    if index >= count:
        there = ", ".join(f"npu:{number}" for number in range(count))
        raise DeviceUnavailable(f"npu:{index} is not there; this host offers {there}")
    at = torch.device("npu", index)
    try:
        npu.set_device(at)
    except RuntimeError as error:
        raise DeviceUnavailable(
            f"npu:{index} cannot be used ({_first_line(error)}). Does another process hold it? See npu-smi info"
        ) from error
    return at


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
