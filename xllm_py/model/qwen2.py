"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on q, k and v, gated MLP, RMS norms, rotary positions."""

from __future__ import annotations

from xllm_py.model.config import ModelConfig, read_common, switched_windows
from xllm_py.model.decoder import Decoder, Layer
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts


class Qwen2(Decoder):
    """model_type qwen2. With `use_sliding_window` the layers from `max_window_layers` on slide."""

    @classmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """See Decoder."""
        return read_common(fields, windows=switched_windows(fields))

    def layer(self, parts: Parts, index: int) -> Layer:
        """See Decoder."""
        mlp = GatedMlp(parts, f"model.layers.{index}.mlp", self.config.intermediate_size)
        return Layer(parts, index, Attention(parts, index, qkv_bias=True), mlp)
