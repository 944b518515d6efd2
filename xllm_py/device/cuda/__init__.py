"""The cuda device: plain torch on one GPU. Kernels of its own are to come; what it computes with today is torch's."""

from __future__ import annotations

import torch

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.apart import ApartDevice


class CudaDevice(ApartDevice):
    """Implements device.base.Device. Raises DeviceUnavailable when this GPU is not there, with what is."""

    collectives = "nccl"

    def __init__(self, index: int) -> None:
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
        super().__init__(torch.device("cuda", index))
        torch.cuda.set_device(index)
        # sums in fewer bits than the numbers have would differ from one shape to another
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def memory(self) -> tuple[int, int]:
        """See Device."""
        free, total = torch.cuda.mem_get_info(self._at)
        return int(free), int(total)

    def variant(self) -> str:
        """See Device."""
        return f"cuda {torch.cuda.get_device_name(self._at)} torch {torch.__version__}"

    def close(self) -> None:
        """See Device."""
        super().close()
        torch.cuda.empty_cache()
