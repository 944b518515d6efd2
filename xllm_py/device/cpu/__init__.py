"""The cpu device: `device` has the memory and the cache, and chooses one of two sets of kernels, `native_kernels` or `torch_kernels`."""

from xllm_py.device.cpu.device import CpuDevice

__all__ = ["CpuDevice"]
