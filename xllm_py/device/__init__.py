"""Floor 3: what computes. One package per device, loaded when it is chosen; devices do not know each other."""

from __future__ import annotations

from xllm_py.base import log
from xllm_py.base.errors import DeviceUnavailable
from xllm_py.core.config import AUTO_DEVICE
from xllm_py.device.base import Device

__all__ = ["Device", "open_device"]

_log = log.get(__name__)


def open_device(name: str, *, threads: int, is_exact: bool = True) -> Device:
    """The device called `cpu:N`, `cuda:N` or `npu:N`; `auto`: the first of npu:0, cuda:0 and cpu:0 that is there, and the log says which and why.

    Raises DeviceUnavailable with what is there and what to do. threads: compute threads of this rank; 0 means all cores. is_exact: else cuda multiplies matrices faster, with bits that depend on the batch; the others have no such form.
    """
    if name == AUTO_DEVICE:
        return _first_there(threads, is_exact)
    kind, _, index = name.partition(":")
    match kind:
        case "cpu":
            from xllm_py.device.cpu import CpuDevice

            return CpuDevice(int(index or 0), threads=threads)
        case "cuda":
            from xllm_py.device.cuda import open_cuda

            return open_cuda(int(index or 0), is_exact=is_exact)
        case "npu":
            from xllm_py.device.npu import NpuDevice

            return NpuDevice(int(index or 0))
    raise DeviceUnavailable(f"{name} is no device. Pass --devices=cpu:0, cuda:0 or npu:0")


def _first_there(threads: int, is_exact: bool) -> Device:
    causes = []
    for name in ("npu:0", "cuda:0"):
        try:
            found = open_device(name, threads=threads, is_exact=is_exact)
        except DeviceUnavailable as error:
            causes.append(error.message.partition(". ")[0])
        else:
            _log.info("device chosen", device=name)
            return found
    _log.info("device chosen", device="cpu:0", because="; ".join(causes))
    return open_device("cpu:0", threads=threads)
