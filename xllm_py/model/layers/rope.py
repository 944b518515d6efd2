"""Rotary position embedding, plain and scaled. Source: Su et al. 2021, RoFormer; halves layout of the Hugging Face checkpoints.

Frequencies are fixed when the model is loaded and never follow the length of a sequence: a key lies rotated in the cache, and what it
is must not depend on when it was computed (docs/decisions, 0018).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from xllm_py.device.base import Turn
from xllm_py.model.rope_config import RopeConfig


class Rope:
    """Cosines and sines of every position, made once. max_position: tokens of the longest sequence that is served."""

    def __init__(
        self,
        config: RopeConfig,
        *,
        head_dim: int,
        max_position: int,
        dtype: torch.dtype,
        put: Callable[[Tensor], Tensor] = lambda made: made,
    ) -> None:
        """put: to where the model computes."""
        speeds = frequencies(config, head_dim, max_position)
        angles = torch.outer(torch.arange(max_position).float(), speeds)
        factor = config.attention_factor
        self._cos = put((angles.cos().repeat(1, 2) * factor).to(dtype))
        self._sin = put((angles.sin().repeat(1, 2) * factor).to(dtype))

    def at(self, positions: Tensor) -> Turn:
        """positions: [tokens] int64."""
        return Turn(cos=self._cos, sin=self._sin, positions=positions)


def frequencies(config: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """Radians a position, [head_dim / 2] float32, highest first.

    The order of operations is that of the papers' code, because a last bit here is a different angle at a far position.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if config.rope_type == "dynamic":
        return 1.0 / (_dynamic_theta(config, head_dim, max_position) ** half)
    plain = 1.0 / (config.theta**half)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, plain)
    if config.rope_type == "yarn":
        return _yarn(config, head_dim, half)
    return plain


def _dynamic_theta(config: RopeConfig, head_dim: int, max_position: int) -> float:
    """The base of NTK-aware scaling for the longest sequence served. Source: bloc97 and emozilla 2023, dynamic NTK."""
    longest = max(max_position, config.original)
    stretch = config.factor * longest / config.original - (config.factor - 1)
    return float(config.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are scaled, short ones left, those between blended. Source: Llama 3.1's reference code (apply_scaling)."""
    waves = 2 * math.pi / plain
    longest, shortest = config.original / config.low_freq, config.original / config.high_freq
    share = (config.original / waves - config.low_freq) / (config.high_freq - config.low_freq)
    blended = (1 - share) * plain / config.factor + share * plain
    scaled = torch.where(waves > longest, plain / config.factor, blended)
    return torch.where(waves < shortest, plain, scaled)


def _yarn(config: RopeConfig, head_dim: int, half: Tensor) -> Tensor:
    """Fast dimensions are left, slow ones scaled, a ramp between. Source: Peng et al. 2023, YaRN, section 3.2."""

    def dimension(turns: float) -> float:
        """Which dimension turns so often within the trained length."""
        turned = math.log(config.original / (turns * 2 * math.pi))
        return head_dim * turned / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a slope
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    periods = config.theta**half
    return 1.0 / (config.factor * periods) * (1 - kept) + 1.0 / periods * kept
