"""Tensors of a checkpoint made into packed linears and norms: what the layers are built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xllm_py.base.errors import ModelLoadError
from xllm_py.device.base import Device, Linear, Quantized, RowWise
from xllm_py.model.config import ModelConfig
from xllm_py.model.quantization import quantize
from xllm_py.model.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Parts:
    """Lives as long as the model is built."""

    config: ModelConfig
    device: Device
    weights: WeightSource
    int8: bool = False  # linears are made 8-bit where the file's are not

    def linear(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> Linear:
        """One product of several linears: name without `.weight` -> rows, in this order; width: of the input."""
        return self.device.pack_linear(*self._joined(sizes, width, bias))

    def router(self, name: str, rows: int) -> Linear:
        """A linear that is never made 8-bit: what it decides is not a sum of many."""
        weight = self.weights.take(f"{name}.weight", (rows, self.config.hidden_size))
        return self.device.pack_linear(weight, None)

    def gated(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> RowWise:
        """The product of gate and up and what is made of it; sizes as for `linear`, gate first."""
        return self.device.pack_gated(*self._joined(sizes, width, bias))

    def norm(self, name: str) -> RowWise:
        """Over the hidden size; name without `.weight`."""
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return self.device.norm(weight, self.config.rms_norm_eps)

    def _joined(
        self, sizes: dict[str, int], width: int, bias: bool
    ) -> tuple[Tensor | Quantized, Tensor | None]:
        found = [self.weights.take(f"{name}.bias", (n,)) for name, n in sizes.items() if bias]
        offset = torch.cat(found) if bias else None
        stored = {self.config.int8 and self.weights.has(f"{name}.weight_scale") for name in sizes}
        if len(stored) == 2:
            raise ModelLoadError(
                f"some of {', '.join(sizes)} have 8-bit weights and some have not; all or none of them must"
            )
        if stored == {True}:
            parts = [self.weights.take_int8(name, (n, width)) for name, n in sizes.items()]
            values = torch.cat([part.values for part in parts])
            return Quantized(values, torch.cat([part.scales for part in parts])), offset
        whole = [self.weights.take(f"{name}.weight", (n, width)) for name, n in sizes.items()]
        weight = torch.cat(whole)
        return quantize(weight) if self.int8 else weight, offset
