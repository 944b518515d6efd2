"""What cuda computes with, in Triton's interpreter on tensors of the host. Imported by processes started for that, before anything of Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from xllm_py.device.cuda.device import TritonDevice


def _dot(_: InterpreterBuilder, a: Any, b: Any, total: Any, *_how: Any) -> TensorHandle:
    """As tensor cores do it: a number depends on its row and its column, and not, as with a library of the host, on where in the tile they stand."""
    left, right = a.data.astype(total.data.dtype), b.data.astype(total.data.dtype)
    done = total.data.copy()
    for k in range(left.shape[1]):
        done += left[:, k : k + 1] * right[k]
    return TensorHandle(done, total.dtype.scalar)


InterpreterBuilder.create_dot = _dot
np.seterr(all="ignore")  # a GPU says nothing either when a number becomes infinite or none


class Interpreted(TritonDevice):
    """Implements Device."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu", 0))

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def variant(self) -> str:
        return "triton's interpreter"
