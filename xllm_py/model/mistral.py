"""Mistral, dense: Llama's layers without biases, all of them with one sliding window. Source: Jiang et al. 2023, Mistral 7B."""

from __future__ import annotations

from xllm_py.model.config import ModelConfig, no_windows, read_common
from xllm_py.model.decoder import Decoder, Layer
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts

_WINDOW = 4096  # of files that do not mention it; null is none


class Mistral(Decoder):
    """model_type mistral. `sliding_window` is a number of tokens or null."""

    @classmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """See Decoder."""
        windows = no_windows(fields)
        if "sliding_window" not in fields.raw or fields.get("sliding_window") is not None:
            windows = (fields.count("sliding_window", _WINDOW),) * len(windows)
        return read_common(fields, windows=windows)

    def layer(self, parts: Parts, index: int) -> Layer:
        """See Decoder."""
        mlp = GatedMlp(parts, f"model.layers.{index}.mlp", self.config.intermediate_size)
        return Layer(parts, index, Attention(parts, index), mlp)
