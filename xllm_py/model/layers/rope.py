"""Rotary position embedding. Source: Su et al. 2021, RoFormer; halves layout of the Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """Cosines and sines of every position, made once."""

    def __init__(
        self, *, head_dim: int, theta: float, max_position: int, dtype: torch.dtype
    ) -> None:
        half = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (theta**half)
        angles = torch.outer(torch.arange(max_position).float(), frequencies)
        self._cos = angles.cos().repeat(1, 2).to(dtype)
        self._sin = angles.sin().repeat(1, 2).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [tokens] int64 -> cos, sin: [tokens, 1, head_dim]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
