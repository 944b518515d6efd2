"""Root-mean-square norm. Row-wise, in float32, so that a row's bits do not depend on the batch."""

from __future__ import annotations

import torch
from torch import Tensor


class RmsNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden]; the result has the same shape and dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self._weight * (wide * scale).to(x.dtype)
