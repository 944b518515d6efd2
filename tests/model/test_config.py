"""config.json as it is found in the world: whole, old, new, broken, and of models this is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from xllm_py.base.errors import ModelLoadError
from xllm_py.model import pick_dtype, read_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, heads=6, kv_heads=3, hidden_size=48, dtype="bfloat16")


def change(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def test_a_whole_config_is_read(folder: Path) -> None:
    config = read_config(folder)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 3, 8)
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (320, 48, 2)
    assert (config.intermediate_size, config.max_position) == (128, 2048)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-6, 10000.0)
    assert (config.tied, config.dtype, config.eos_token_ids) == (False, "bfloat16", (2,))


def test_missing_fields_with_a_usual_value_have_it(folder: Path) -> None:
    change(folder, num_key_value_heads=None, rms_norm_eps=None, rope_theta=None, torch_dtype=None)
    config = read_config(folder)
    assert (config.num_kv_heads, config.rope.theta, config.rms_norm_eps) == (6, 10000.0, 1e-6)
    assert config.dtype == "float32"


def test_the_words_of_newer_files_are_understood(folder: Path) -> None:
    change(
        folder,
        rope_theta=None,
        torch_dtype=None,
        dtype="torch.bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        head_dim=16,
    )
    config = read_config(folder)
    assert (config.rope.theta, config.dtype, config.head_dim) == (1e6, "bfloat16", 16)


@pytest.mark.parametrize(
    ("model", "generation", "wanted"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (5, {"eos_token_id": [7, 8]}, (7, 8)),
        (5, {"temperature": 0.7}, (5,)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, None, ()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    folder: Path, model: Any, generation: Any, wanted: tuple[int, ...]
) -> None:
    change(folder, eos_token_id=model)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(folder).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model_type": "llama9"},
            "model_type is 'llama9', which is not supported; known: llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 4}, "model_type is missing or no text"),
        ({"vocab_size": None}, "vocab_size is null; a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0; a positive integer"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is two"),
        ({"num_attention_heads": True}, "num_attention_heads is true"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4 KV heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is small"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is null; a number of at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.type is longrope, which is not"),
        (
            {"rope_parameters": {"rope_type": ["yarn"]}},
            "known: default, linear, dynamic, yarn, llama3",
        ),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.rope_type is missing beside a factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling is yarn, not a JSON object"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope_scaling.high_freq_factor is 4; more than low_freq_factor 4",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "rope_scaling.low_freq_factor is null",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}},
            "rope_scaling.beta_slow is 2",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "truncate is 1; true or"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is Infinity"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
            "head_dim is 2; dynamic rope scaling needs at least 4",
        ),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is big"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"use_sliding_window": True}, "sliding_window is null; a positive integer"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1; true or false"),
        ({"use_sliding_window": True, "sliding_window": -4}, "sliding_window is -4"),
        ({"use_sliding_window": True, "sliding_window": True}, "sliding_window is true"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is no; true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, which is not supported; known: silu"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size is 50; 6 heads cannot divide it"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types is full_attention, not a list"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; 2 layers need 2"),
        ({"layer_types": ["mamba", "mamba"]}, "layer_types names 'mamba'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": 3}, "rope_parameters is 3, not a JSON object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method"),
        ({"head_dim": 7}, "heads of 7 have no halves to rotate"),
        ({"eos_token_id": "end"}, "eos_token_id is end, no token id"),
        ({"eos_token_id": [1, -2]}, "is [1, -2], no token id"),
        ({"eos_token_id": True}, "eos_token_id is True, no token id"),
    ],
)
def test_what_cannot_be_served_is_one_line_with_file_and_field(
    folder: Path, fields: dict[str, Any], words: str
) -> None:
    change(folder, **fields)
    with pytest.raises(ModelLoadError) as caught:
        read_config(folder)
    assert words in caught.value.message
    assert str(folder / "config.json") in caught.value.message
    assert "\n" not in caught.value.message


def test_neutral_values_of_what_is_not_built_are_no_obstacle(folder: Path) -> None:
    wanted = read_config(folder)
    change(
        folder,
        rope_scaling={},
        use_sliding_window=False,
        layer_types=["full_attention", "full_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    )
    assert read_config(folder) == wanted


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is not JSON"),
        (b'{"model_type": "qwen2"', "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_a_broken_file_is_named(folder: Path, raw: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(raw)
    with pytest.raises(ModelLoadError, match=words):
        read_config(folder)


def test_a_folder_without_config_or_no_folder_at_all_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelLoadError, match="is this a model folder"):
            read_config(folder)


def test_auto_is_the_files_dtype_and_a_wish_counts_more(folder: Path) -> None:
    config = read_config(folder)
    assert pick_dtype("auto", config) is torch.bfloat16
    assert pick_dtype("float32", config) is torch.float32


@pytest.mark.parametrize("wanted", ["float16", "int8", "auto"])
def test_a_dtype_that_is_not_computed_here_is_refused_with_those_that_are(
    folder: Path, wanted: str
) -> None:
    change(folder, torch_dtype="float16")
    with pytest.raises(ModelLoadError, match="--dtype=bfloat16 or --dtype=float32"):
        pick_dtype(wanted, read_config(folder))
