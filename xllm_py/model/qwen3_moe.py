"""Qwen3-MoE: Qwen3's attention, and in most layers a mixture of experts instead of the MLP."""

from __future__ import annotations

from xllm_py.model.config import ExpertsConfig, ModelConfig, read_common, switched_windows
from xllm_py.model.decoder import Decoder, Layer
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.experts import Experts
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts


class Qwen3Moe(Decoder):
    """model_type qwen3_moe. Every `decoder_sparse_step`th layer has experts, but for those in `mlp_only_layers`."""

    @classmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """See Decoder."""
        return read_common(
            fields,
            windows=switched_windows(fields, first_layer=0),
            attention_bias=fields.flag("attention_bias", False),
            experts=_read_experts(fields),
        )

    def layer(self, parts: Parts, index: int) -> Layer:
        """See Decoder."""
        config, at = self.config, f"model.layers.{index}.mlp"
        bias = config.attention_bias
        attention = Attention(parts, index, qkv_bias=bias, out_bias=bias, head_norms=True)
        if config.experts is not None and index in config.experts.layers:
            return Layer(parts, index, attention, Experts(parts, at, config.experts))
        return Layer(parts, index, attention, GatedMlp(parts, at, config.intermediate_size))


def _read_experts(fields: Fields) -> ExpertsConfig:
    # newer files call it num_local_experts
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    if fields.get(name) is None:
        fields.refuse("num_experts", "is missing; a positive integer is needed")
    count, each = fields.count(name), fields.count("num_experts_per_tok")
    if each > count:
        fields.refuse("num_experts_per_tok", f"is {each}, but {name} is {count}; lower it")
    layers, step = fields.count("num_hidden_layers"), fields.count("decoder_sparse_step", 1)
    plain = fields.items("mlp_only_layers")
    for index in plain:
        if type(index) is not int or not 0 <= index < layers:
            fields.refuse("mlp_only_layers", f"names {index!r}; the layers are 0 to {layers - 1}")
    return ExpertsConfig(
        count=count,
        per_token=each,
        intermediate_size=fields.count("moe_intermediate_size"),
        normalised=fields.flag("norm_topk_prob", False),
        layers=frozenset(i for i in range(layers) if (i + 1) % step == 0 and i not in plain),
    )
