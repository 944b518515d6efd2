"""The cuda device. What needs Triton is loaded when the GPU asked for is there."""

from __future__ import annotations

import torch

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.base import Device


def open_cuda(index: int, *, is_exact: bool = True) -> Device:
    """GPU number `index`. Raises DeviceUnavailable when it is not there, with what is.

    is_exact: see device.CudaDevice.
    """
    if not torch.cuda.is_available():
        cause = (
            "torch sees no GPU; is the driver loaded?"
            if torch.version.cuda
            else "this torch is built without cuda; install the cuda build of the same version"
        )
        raise DeviceUnavailable(f"cuda:{index}: {cause} Or pass --devices=cpu:0")
    count = torch.cuda.device_count()
    if index >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count))
        raise DeviceUnavailable(f"cuda:{index} is not there; this host offers {there}")
    try:
        from xllm_py.device.cuda.device import CudaDevice
    except ModuleNotFoundError as error:
        raise DeviceUnavailable(
            f"cuda:{index}: the kernels need triton, which the cuda build of torch brings; pip install triton"
        ) from error
    return CudaDevice(index, is_exact=is_exact)
