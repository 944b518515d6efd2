"""Tiny checkpoints of every model family, seeded, in the Hugging Face layout: what the family tests run over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 160
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 2.0,  # not the usual 1, which would hide its place in the formula
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 24,
}

# what config.json says beyond COMMON; windows are shorter than the prompts of the tests
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2, last layers slide": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, tied, biases, dynamic rope": {
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "llama": {"model_type": "llama"},
    "llama, llama3 rope, tied": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "llama, linear rope, biases": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral, window": {"model_type": "mistral", "sliding_window": 33, "num_key_value_heads": 1},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "qwen3_moe, some layers dense": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
    },
}


def make_family(folder: Path, fields: dict[str, Any], *, seed: int = 0) -> Path:
    """Write config.json and one safetensors file. fields: over COMMON, `model_type` among them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | fields
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, config["torch_dtype"])
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor = 1 + noise * 0.1
        elif name.endswith("bias"):
            tensor = noise * 0.2
        elif name == "model.embed_tokens.weight":
            tensor = noise
        else:
            # attention and router so sharp that a wrong key or expert shows
            sharp = any(part in name for part in ("q_proj", "k_proj", "mlp.gate.weight"))
            tensor = noise * (2 if sharp else 1) * shape[-1] ** -0.5
        tensors[name] = tensor.to(kind).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this config has."""
    hidden, kind = config["hidden_size"], config["model_type"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (size * dim, hidden)
            if kind == "qwen2" or config.get("attention_bias"):
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (size * dim,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * dim)
        if config.get("attention_bias"):
            shapes[f"{at}.self_attn.o_proj.bias"] = (hidden,)
        if kind.startswith("qwen3"):
            shapes[f"{at}.self_attn.q_norm.weight"] = (dim,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (dim,)
        shapes |= _feed_shapes(config, index)
    return shapes


def _feed_shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    at, hidden = f"model.layers.{index}.mlp", config["hidden_size"]
    sparse = config["model_type"] == "qwen3_moe" and index not in config["mlp_only_layers"]
    if not sparse or (index + 1) % config["decoder_sparse_step"]:
        return _mlp_shapes(at, hidden, config["intermediate_size"], config.get("mlp_bias", False))
    shapes: dict[str, tuple[int, ...]] = {f"{at}.gate.weight": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        shapes |= _mlp_shapes(
            f"{at}.experts.{expert}", hidden, config["moe_intermediate_size"], False
        )
    return shapes


def _mlp_shapes(at: str, hidden: int, wide: int, bias: bool) -> dict[str, tuple[int, ...]]:
    rows = {"gate_proj": wide, "up_proj": wide, "down_proj": hidden}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, count in rows.items():
        shapes[f"{at}.{name}.weight"] = (count, wide if name == "down_proj" else hidden)
        if bias:
            shapes[f"{at}.{name}.bias"] = (count,)
    return shapes
