"""The shapes that benchmarks measure, and model folders of them without weights; `--load_format=dummy` makes those, seeded.

For serving there is a tokenizer: every token of the vocabulary is whole text, so that each token is an event of a stream.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "5m": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str) -> dict[str, Any]:
    """What stands in its config.json."""
    return {**COMMON, **SHAPES[shape], "eos_token_id": SHAPES[shape]["vocab_size"] - 1}


def write_model(folder: Path, shape: str) -> Path:
    """A folder that `xllm --load_format=dummy` and `xllm-master` take."""
    folder.mkdir(parents=True)
    size = SHAPES[shape]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    words, merges = _words(size - 1)
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(size - 1, "<|end|>")],
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"chat_template": template, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_weights(folder: Path, shape: str) -> None:
    """The weights that `--load_format=dummy` would make, as a safetensors file beside the config, for programs other than ours."""
    from safetensors.torch import save_file

    from xllm_py.model.weights import DummyWeights

    source = DummyWeights(torch.bfloat16)
    shapes = tensor_shapes(shape)
    tensors = {name: source.take(name, size) for name, size in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensor_shapes(shape: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint."""
    config = config_of(shape)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    inner_kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", inner_kv), ("v", inner_kv)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            found[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{at}.mlp.gate_proj.weight"] = found[f"{at}.mlp.up_proj.weight"] = (wide, hidden)
        found[f"{at}.mlp.down_proj.weight"] = (hidden, wide)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = (hidden,)
    return found


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def _words(count: int) -> tuple[list[str], list[str]]:
    """Letters, pairs and fours of them, as many as asked for, and the merges that make them; a real vocabulary's size."""
    letters = list(string.ascii_lowercase)
    pairs = [a + b for a in letters for b in letters]
    fours = [a + b for a in pairs for b in pairs]
    words = [*letters, *pairs, *fours][:count]
    half = {2: 1, 4: 2}
    merges = [f"{w[: half[len(w)]]} {w[half[len(w)] :]}" for w in words[len(letters) :]]
    return words, merges


def _special(token: int, text: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **plain, "special": True}
