"""Tensors of a checkpoint made into packed linears and norms: what the layers are built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xllm_py.device.base import Device, Linear, RowWise
from xllm_py.model.config import ModelConfig
from xllm_py.model.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Parts:
    """Lives as long as the model is built."""

    config: ModelConfig
    device: Device
    weights: WeightSource

    def linear(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> Linear:
        """One product of several linears: name without `.weight` -> rows, in this order; width: of the input."""
        return self.device.pack_linear(*self._joined(sizes, width, bias))

    def gated(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> RowWise:
        """The product of gate and up and what is made of it; sizes as for `linear`, gate first."""
        return self.device.pack_gated(*self._joined(sizes, width, bias))

    def norm(self, name: str) -> RowWise:
        """Over the hidden size; name without `.weight`."""
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return self.device.norm(weight, self.config.rms_norm_eps)

    def _joined(
        self, sizes: dict[str, int], width: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight = [self.weights.take(f"{name}.weight", (n, width)) for name, n in sizes.items()]
        offset = [self.weights.take(f"{name}.bias", (n,)) for name, n in sizes.items() if bias]
        return torch.cat(weight), torch.cat(offset) if bias else None
