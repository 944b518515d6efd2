"""Floor 3: what computes. One file per device, loaded when it is chosen; devices do not know each other."""

from __future__ import annotations

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.base import Device

__all__ = ["Device", "open_device"]


def open_device(name: str, *, threads: int) -> Device:
    """The device called `cpu:N`, `cuda:N` or `npu:N`. Raises DeviceUnavailable with what is there and what to do.

    threads: compute threads of this rank; 0 means all cores.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        from xllm_py.device.cpu import CpuDevice

        return CpuDevice(int(index or 0), threads=threads)
    if kind == "npu":
        raise DeviceUnavailable(
            f"{name}: torch_npu and CANN are not usable here; install xllm_py[npu] on an Ascend host and "
            "source CANN's set_env.sh, or pass --devices=cpu:0"
        )
    raise DeviceUnavailable(f"{name} is not there; this host offers cpu:0. Pass --devices=cpu:0")
