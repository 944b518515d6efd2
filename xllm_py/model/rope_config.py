"""How a checkpoint scales its rotary positions: `rope_scaling` of older config files, `rope_parameters` of newer ones.

Read by model/config; the frequencies are made by layers/rope. An unknown way to scale is refused, never passed over: the model
would answer, but wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from xllm_py.model.fields import Fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Fields that a type does not use keep their defaults. Lengths in tokens."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0  # how much longer the scaled positions reach
    original: int = 0  # length the model was trained for before it was scaled
    attention_factor: float = 1.0  # yarn: on cosines and sines
    beta_fast: float = 32.0  # yarn: dimensions that turn more often are left alone
    beta_slow: float = 1.0  # yarn: dimensions that turn less often are scaled by the whole factor
    truncate: bool = True  # yarn: round the two bounds to whole dimensions
    low_freq: float = 1.0  # llama3: waves longer than original / low_freq are scaled
    high_freq: float = 4.0  # llama3: waves shorter than original / high_freq are not

    def reach(self, max_position: int) -> int:
        """The longest sequence the positions are good for; max_position: the model's own length."""
        if self.rope_type in ("linear", "dynamic"):
            return int(self.factor * max_position)
        if self.rope_type == "yarn":
            return max(max_position, int(self.factor * self.original))
        return max_position

    def variant(self, max_len: int) -> str:
        """What an instance serving max_len tokens computes otherwise than one with another length; "" when nothing."""
        longer = self.rope_type == "dynamic" and max_len > self.original
        return f"dynamic rope at {max_len}" if longer else ""


def read_rope(fields: Fields, max_position: int, head_dim: int) -> RopeConfig:
    """Raises ModelLoadError that names the field."""
    # a file with both was written by old code from a new one; transformers lets the older name win too
    rope = fields.part("rope_scaling") or fields.part("rope_parameters") or Fields(fields.path, {})
    newer = fields.part("rope_parameters") or rope
    theta = rope.number("rope_theta", newer.number("rope_theta", fields.number("rope_theta", 1e4)))
    for place in (fields, rope):
        if place.get("partial_rotary_factor") not in (None, 1):
            place.refuse("partial_rotary_factor", "is not supported yet; use another model")
    kind = _kind(rope)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = rope.number("factor", least=1.0)
    if kind == "linear":
        return RopeConfig(rope_type=kind, theta=theta, factor=factor)
    if kind == "dynamic":
        if head_dim < 4:
            fields.refuse("head_dim", f"is {head_dim}; dynamic rope scaling needs at least 4")
        return RopeConfig(rope_type=kind, theta=theta, factor=factor, original=max_position)
    original = fields.count(
        "original_max_position_embeddings",
        rope.count("original_max_position_embeddings", max_position),
    )
    if kind == "yarn":
        return _yarn(rope, theta, factor, original)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        rope.refuse("high_freq_factor", f"is {high:g}; more than low_freq_factor {low:g} is needed")
    return RopeConfig(
        rope_type=kind, theta=theta, factor=factor, original=original, low_freq=low, high_freq=high
    )


def _kind(rope: Fields) -> str:
    name = "type" if rope.get("rope_type") is None and rope.get("type") else "rope_type"
    kind = rope.get(name)
    if kind is None:
        if rope.get("factor") is not None:
            rope.refuse(name, f"is missing beside a factor; known: {', '.join(ROPE_TYPES)}")
        return "default"
    if kind not in ROPE_TYPES:
        rope.refuse(name, f"is {kind}, which is not supported; known: {', '.join(ROPE_TYPES)}")
    return str(kind)


def _yarn(rope: Fields, theta: float, factor: float, original: int) -> RopeConfig:
    if theta <= 1:
        rope.refuse("rope_theta", f"is {theta:g}; yarn needs more than 1")
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow > fast:
        rope.refuse("beta_slow", f"is {slow:g}; at most beta_fast {fast:g} is needed")
    attention = _yarn_attention(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _yarn_attention(factor, rope.number("mscale")) / _yarn_attention(
            factor, rope.number("mscale_all_dim")
        )
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original=original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention(factor: float, scale: float) -> float:
    """Peng et al. 2023, YaRN, equation 22, with the weight that DeepSeek's files give it."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
