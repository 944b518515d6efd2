"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on q, k and v, gated MLP, RMS norms, rotary positions.

Made by model.load_model, called by engine/worker. Names of tensors are those of the Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.base import AttentionBatch, Device, Linear
from xllm_py.model.config import ModelConfig
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.norm import RmsNorm
from xllm_py.model.layers.rope import Rope, rotate
from xllm_py.model.weights import WeightSource


class _Layer:
    """One decoder layer."""

    def __init__(
        self, index: int, config: ModelConfig, device: Device, weights: WeightSource
    ) -> None:
        self._index = index
        self._config = config
        self._device = device
        hidden, dim = config.hidden_size, config.head_dim
        prefix = f"model.layers.{index}"
        parts, biases = [], []
        for name, heads in (
            ("q", config.num_heads),
            ("k", config.num_kv_heads),
            ("v", config.num_kv_heads),
        ):
            at = f"{prefix}.self_attn.{name}_proj"
            parts.append(weights.take(f"{at}.weight", (heads * dim, hidden)))
            biases.append(weights.take(f"{at}.bias", (heads * dim,)))
        self._qkv: Linear = device.pack_linear(torch.cat(parts), torch.cat(biases))
        out = weights.take(f"{prefix}.self_attn.o_proj.weight", (hidden, config.num_heads * dim))
        self._out: Linear = device.pack_linear(out, None)
        wide = config.intermediate_size
        self._mlp = GatedMlp(
            device,
            weights.take(f"{prefix}.mlp.gate_proj.weight", (wide, hidden)),
            weights.take(f"{prefix}.mlp.up_proj.weight", (wide, hidden)),
            weights.take(f"{prefix}.mlp.down_proj.weight", (hidden, wide)),
        )
        eps = config.rms_norm_eps
        norm = weights.take(f"{prefix}.input_layernorm.weight", (hidden,))
        after = weights.take(f"{prefix}.post_attention_layernorm.weight", (hidden,))
        self._norm, self._norm_after = RmsNorm(norm, eps), RmsNorm(after, eps)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: AttentionBatch,
        stored: Callable[[int], None] | None,
    ) -> Tensor:
        """x: [tokens, hidden]. `stored` is called when this layer's keys and values are in the cache."""
        config = self._config
        tokens, real = x.shape[0], batch.slots.shape[0]
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        mixed = self._qkv(self._norm(x)).view(tokens, heads + 2 * kv_heads, dim)
        turned = rotate(mixed[:, : heads + kv_heads], cos, sin)
        keys, values = turned[:real, heads:], mixed[:real, heads + kv_heads :]
        self._device.write_kv(self._index, keys, values, batch.slots)
        if stored is not None:
            stored(self._index)
        attended = self._device.attend(turned[:, :heads].contiguous(), self._index, batch)
        x = x + self._out(attended.view(tokens, heads * dim))
        return x + self._mlp(self._norm_after(x))


class Qwen2:
    """The whole model on one rank."""

    def __init__(
        self, config: ModelConfig, device: Device, weights: WeightSource, max_position: int
    ) -> None:
        self.config = config
        vocabulary = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", vocabulary)
        self.dtype = self._embedding.dtype
        self._layers = [_Layer(i, config, device, weights) for i in range(config.num_layers)]
        norm = weights.take("model.norm.weight", (config.hidden_size,))
        self._norm = RmsNorm(norm, config.rms_norm_eps)
        head = self._embedding if config.tied else weights.take("lm_head.weight", vocabulary)
        self._head: Linear = device.pack_linear(head, None)
        weights.finish(
            ("lm_head.weight", "rotary_emb.inv_freq") if config.tied else ("rotary_emb.inv_freq",)
        )
        self._padding = device.row_padding()
        self._rope = Rope(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            max_position=max_position,
            dtype=self.dtype,
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        stored: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [tokens, hidden].

        token_ids, positions: [tokens] int64, padded by the caller to a multiple of the device's row padding.
        """
        x = functional.embedding(token_ids, self._embedding)
        cos, sin = self._rope.at(positions)
        for layer in self._layers:
            x = layer(x, cos, sin, batch, stored)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocabulary] float32."""
        rows = hidden.shape[0]
        padded = functional.pad(hidden, (0, 0, 0, -rows % self._padding))
        return self._head(padded)[:rows].float()
