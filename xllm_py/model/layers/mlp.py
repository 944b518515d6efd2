"""The gated MLP, down(silu(gate(x)) * up(x)), with gate and up as one product. Source: Shazeer 2020, GLU variants."""

from __future__ import annotations

from torch import Tensor

from xllm_py.model.layers.parts import Parts


class GatedMlp:
    """at: where its three linears stand in the checkpoint; wide: rows of gate and of up.

    sums: over the ranks, of which each has an even share of these rows; else that is left to the caller.
    """

    def __init__(
        self, parts: Parts, at: str, wide: int, *, bias: bool = False, sums: bool = True
    ) -> None:
        hidden = parts.config.hidden_size
        both = {f"{at}.gate_proj": wide, f"{at}.up_proj": wide}
        self._gate_up = parts.gated(both, hidden, bias=bias)
        down = f"{at}.down_proj"
        if sums:
            self._down = parts.summed(down, hidden, wide, parts.shard.of(wide), bias=bias)
        else:
            self._down = parts.partial(down, hidden, wide)

    def __call__(self, x: Tensor, real: int, residual: Tensor | None = None) -> Tensor:
        """x: [tokens, hidden], padded, of which the first `real` are tokens; the result has the same shape and dtype.

        residual: what the result is added to. All rows are computed: a product may have its exact bits only with the padding.
        """
        assert real <= x.shape[0]
        return self._down(self._gate_up(x), residual)
