"""Tensors of a checkpoint made into packed linears and norms, of the part that this rank holds: what the layers are built with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from xllm_py.base.errors import ModelLoadError
from xllm_py.device.base import Device, Linear, Quantized, RowWise
from xllm_py.model.config import ModelConfig
from xllm_py.model.quantization import quantize
from xllm_py.model.sharding import Shard
from xllm_py.model.weights import Part, WeightSource

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Parts:
    """Lives as long as the model is built."""

    config: ModelConfig  # of the whole model
    device: Device
    weights: WeightSource
    int8: bool = False  # linears are made 8-bit where the file's are not
    shard: Shard = field(default_factory=Shard)

    def linear(
        self, sizes: dict[str, int], width: int, *, here: dict[str, slice], bias: bool = False
    ) -> Linear:
        """One product of several linears: name without `.weight` -> rows, in this order; width: of the input.

        here: the rows of each that this rank computes.
        """
        return self.device.pack_linear(*self._joined(sizes, width, bias, here))

    def summed(
        self, name: str, rows: int, width: int, here: slice, *, bias: bool = False
    ) -> Linear:
        """A linear whose input is shared out: this rank has the columns `here` of it, and the result is the sum over the ranks."""
        alone = self.shard.count == 1
        sizes = {name: rows}
        weight, offset = self._joined(sizes, width, bias, {}, _ALL if alone else here)
        if alone:
            return self.device.pack_linear(weight, offset)
        product, put, ranks = (
            self.device.pack_linear(weight, None),
            self.device.put,
            self.shard.ranks,
        )
        added = None if offset is None else put(offset)

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = ranks.sum(product(x))
            y = y if added is None else y + added
            return y if residual is None else residual + y

        return linear

    def router(self, name: str, rows: int) -> Linear:
        """A linear that is never made 8-bit: what it decides is not a sum of many."""
        weight = self.weights.take(f"{name}.weight", (rows, self.config.hidden_size))
        return self.device.pack_linear(weight, None)

    def gated(self, sizes: dict[str, int], width: int, *, bias: bool = False) -> RowWise:
        """The product of gate and up and what is made of it, an even share of their rows; sizes as for `linear`, gate first."""
        here = {name: self.shard.of(rows) for name, rows in sizes.items()}
        return self.device.pack_gated(*self._joined(sizes, width, bias, here))

    def partial(self, name: str, rows: int, width: int) -> Linear:
        """As `summed`, an even share of the columns, but the summing is the caller's."""
        columns = _ALL if self.shard.count == 1 else self.shard.of(width)
        return self.device.pack_linear(*self._joined({name: rows}, width, False, {}, columns))

    def norm(self, name: str) -> RowWise:
        """Over the hidden size; name without `.weight`."""
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return self.device.norm(weight, self.config.rms_norm_eps)

    def _joined(
        self,
        sizes: dict[str, int],
        width: int,
        bias: bool,
        here: dict[str, slice],
        columns: slice = _ALL,
    ) -> tuple[Tensor | Quantized, Tensor | None]:
        def part(name: str) -> Part:
            rows = here.get(name, _ALL)
            return () if rows == _ALL == columns else (rows, columns)

        found = [
            self.weights.take(f"{name}.bias", (n,), part(name)[:1])
            for name, n in sizes.items()
            if bias
        ]
        offset = torch.cat(found) if bias else None
        stored = {self.config.int8 and self.weights.has(f"{name}.weight_scale") for name in sizes}
        if len(stored) == 2:
            raise ModelLoadError(
                f"some of {', '.join(sizes)} have 8-bit weights and some have not; all or none of them must"
            )
        if stored == {True}:
            parts = [
                self.weights.take_int8(name, (n, width), part(name)) for name, n in sizes.items()
            ]
            values = torch.cat([each.values for each in parts])
            return Quantized(values, torch.cat([each.scales for each in parts])), offset
        whole = [
            self.weights.take(f"{name}.weight", (n, width), part(name)) for name, n in sizes.items()
        ]
        weight = torch.cat(whole)
        return quantize(weight) if self.int8 else weight, offset
