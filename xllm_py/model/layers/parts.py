"""Tensors of a checkpoint made into packed linears and norms: what the layers are built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xllm_py.device.base import Device, Linear
from xllm_py.model.config import ModelConfig
from xllm_py.model.layers.norm import RmsNorm
from xllm_py.model.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Parts:
    """Lives as long as the model is built."""

    config: ModelConfig
    device: Device
    weights: WeightSource

    def linear(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> Linear:
        """One product of several linears: name without `.weight` -> rows, in this order; width: of the input."""
        weight = [self.weights.take(f"{name}.weight", (n, width)) for name, n in sizes.items()]
        offset = [self.weights.take(f"{name}.bias", (n,)) for name, n in sizes.items() if bias]
        return self.device.pack_linear(torch.cat(weight), torch.cat(offset) if bias else None)

    def norm(self, name: str) -> RmsNorm:
        """Over the hidden size; name without `.weight`."""
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return RmsNorm(weight, self.config.rms_norm_eps)
