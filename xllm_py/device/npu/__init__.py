"""The npu device: Ascend NPUs through torch_npu's operators; `simulated` stands in for an NPU where there is none."""

from xllm_py.device.npu.device import NpuDevice

__all__ = ["NpuDevice"]
