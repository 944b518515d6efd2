"""The gated MLP, down(silu(gate(x)) * up(x)), with gate and up as one product. Source: Shazeer 2020, GLU variants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.model.layers.parts import Parts


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    torch's own takes another code path for the elements left over when a thread's share does not fill vector registers, with other
    bits in float32; in bfloat16 both round to the same for every input there is. Exponential and division have no such rest.
    """
    if x.dtype is torch.bfloat16:
        return functional.silu(x)
    return x / torch.exp(-x).add_(1)


class GatedMlp:
    """at: where its three linears stand in the checkpoint; wide: rows of gate and of up."""

    def __init__(self, parts: Parts, at: str, wide: int, *, bias: bool = False) -> None:
        hidden = parts.config.hidden_size
        self._gate_up = parts.linear(
            {f"{at}.gate_proj": wide, f"{at}.up_proj": wide}, hidden, bias=bias
        )
        self._down = parts.linear({f"{at}.down_proj": hidden}, wide, bias=bias)

    def __call__(self, x: Tensor, real: int) -> Tensor:
        """x: [tokens, hidden], padded, of which the first `real` are tokens; the result has the same shape and dtype.

        All rows are computed: a product has its exact bits only with the padding.
        """
        assert real <= x.shape[0]
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(silu(gate.contiguous()) * up)
