"""Llama 2 and 3.x, dense: grouped-query attention without norms on heads, gated MLP; biases where the file asks for them."""

from __future__ import annotations

from xllm_py.model.config import ModelConfig, no_windows, read_common
from xllm_py.model.decoder import Decoder, Layer
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts


class Llama(Decoder):
    """model_type llama. `attention_bias` adds offsets to q, k, v and o, `mlp_bias` to gate, up and down."""

    @classmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """See Decoder."""
        return read_common(
            fields,
            windows=no_windows(fields),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )

    def layer(self, parts: Parts, index: int) -> Layer:
        """See Decoder."""
        config = self.config
        bias = config.attention_bias
        attention = Attention(parts, index, qkv_bias=bias, out_bias=bias)
        at = f"model.layers.{index}.mlp"
        mlp = GatedMlp(parts, at, config.intermediate_size, bias=config.mlp_bias)
        return Layer(parts, index, attention, mlp)
