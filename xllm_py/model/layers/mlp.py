"""The gated MLP, down(silu(gate(x)) * up(x)), with gate and up as one product. Source: Shazeer 2020, GLU variants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.base import Device, Linear


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    torch's own takes another code path for the elements left over when a thread's share does not fill vector registers, with other
    bits in float32; in bfloat16 both round to the same for every input there is. Exponential and division have no such rest.
    """
    if x.dtype is torch.bfloat16:
        return functional.silu(x)
    return x / torch.exp(-x).add_(1)


class GatedMlp:
    """weights: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    def __init__(self, device: Device, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._gate_up: Linear = device.pack_linear(torch.cat((gate, up)), None)
        self._down: Linear = device.pack_linear(down, None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden]; the result has the same shape and dtype."""
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(silu(gate.contiguous()) * up)
