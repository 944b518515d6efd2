"""The gated MLP, down(silu(gate(x)) * up(x)), with gate and up as one product. Source: Shazeer 2020, GLU variants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.base import Device, Linear

# silu takes another code path for the last elements of a row that do not fill a vector register, with other bits in float32;
# zero columns make rows end on a whole number of vectors
_COLUMNS = 64


def pad_rows(weight: Tensor) -> Tensor:
    """[intermediate, hidden] with zero rows up to a multiple of 64."""
    return functional.pad(weight, (0, 0, 0, -weight.shape[0] % _COLUMNS))


class GatedMlp:
    """weights: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    def __init__(self, device: Device, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._gate_up: Linear = device.pack_linear(torch.cat((pad_rows(gate), pad_rows(up))), None)
        columns = -down.shape[1] % _COLUMNS
        self._down: Linear = device.pack_linear(functional.pad(down, (0, columns)), None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden]; the result has the same shape and dtype."""
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(functional.silu(gate.contiguous()) * up)
