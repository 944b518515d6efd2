"""Pieces of the layers' arithmetic in plain torch, on whatever device their tensors are: of cpu's torch form and of `apart`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.base import Linear, Quantized


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    torch's own takes another code path for the elements left over when a thread's share does not fill vector registers, with other
    bits in float32; in bfloat16 both round to the same for every input there is. Exponential and division have no such rest.
    """
    if x.dtype is torch.bfloat16:
        return functional.silu(x)
    return x / torch.exp(-x).add_(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See Device.norm; weight is broadcast."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def linear8(weight: Quantized, bias: Tensor | None) -> Linear:
    """See Device.pack_linear."""
    columns = weight.values.t().contiguous()

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        wide = x.float()
        peaks = wide.abs().amax(-1, keepdim=True)
        values = (
            (wide * (torch.tensor(127.0) / peaks).nan_to_num(0.0, posinf=0.0))
            .round()
            .to(torch.int8)
        )
        y = torch._int_mm(values, columns).float() * weight.scales * (peaks / 127.0)
        y = (y if bias is None else y + bias.float()).to(x.dtype)
        return y if residual is None else residual + y

    return linear
