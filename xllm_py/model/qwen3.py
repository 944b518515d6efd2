"""Qwen3, dense: like Qwen2 with normed heads of queries and keys, heads of a size of their own, and no biases unless the file says so."""

from __future__ import annotations

from xllm_py.model.config import ModelConfig, read_common, switched_windows
from xllm_py.model.decoder import Decoder, Layer
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts


class Qwen3(Decoder):
    """model_type qwen3. `attention_bias` adds offsets to q, k, v and o."""

    @classmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """See Decoder."""
        return read_common(
            fields,
            windows=switched_windows(fields),
            head_dim=128,
            attention_bias=fields.flag("attention_bias", False),
        )

    def layer(self, parts: Parts, index: int) -> Layer:
        """See Decoder."""
        bias = self.config.attention_bias
        attention = Attention(parts, index, qkv_bias=bias, out_bias=bias, head_norms=True)
        mlp = GatedMlp(parts, f"model.layers.{index}.mlp", self.config.intermediate_size)
        return Layer(parts, index, attention, mlp)
