"""Random checkpoints in the Hugging Face layout, seeded, and a byte-level tokenizer to serve them with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """One token per byte, and three special ones behind them: ids 256, 257, 258."""
    vocabulary = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 320,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 0,
    intermediate: int = 128,
    tied: bool = False,
    dtype: str = "float32",
    with_tokenizer: bool = False,
    max_position: int = 2048,
    shards: int = 1,
) -> Path:
    """Write config.json and safetensors; weights are large enough that greedy answers are not one token for ever."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dim = head_dim or hidden_size // heads
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "eos_token_id": 258 if with_tokenizer else 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(torch, dtype)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(kind)

    tensors = {
        "model.embed_tokens.weight": random(vocab_size, hidden_size, scale=1.0),
        "model.norm.weight": (1 + random(hidden_size, scale=0.1).float()).to(kind),
    }
    if not tied:
        tensors["lm_head.weight"] = random(vocab_size, hidden_size, scale=hidden_size**-0.5)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = random(
                size * dim, hidden_size, scale=2 * hidden_size**-0.5
            )
            tensors[f"{at}.self_attn.{name}_proj.bias"] = random(size * dim, scale=0.2)
        tensors[f"{at}.self_attn.o_proj.weight"] = random(
            hidden_size, heads * dim, scale=hidden_size**-0.5
        )
        for name, shape in (
            ("gate_proj", (intermediate, hidden_size)),
            ("up_proj", (intermediate, hidden_size)),
            ("down_proj", (hidden_size, intermediate)),
        ):
            tensors[f"{at}.mlp.{name}.weight"] = random(*shape, scale=shape[1] ** -0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = (1 + random(hidden_size, scale=0.1).float()).to(kind)
    _save(folder, tensors, shards)
    if with_tokenizer:
        make_tokenizer(folder)
    return folder


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def make_int8(folder: Path) -> Path:
    """Rewrite a checkpoint of one file as llm-compressor leaves it: linears of the layers in 8 bits, their scales beside them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scales = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scales).round().to(torch.int8)
        tensors[f"{name}_scale"] = scales
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return folder
