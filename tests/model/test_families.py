"""What only one family has in its config, and checkpoints of it that cannot be served: one line with file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import CASES, EXPERTS, make_family
from xllm_py.base.errors import ModelLoadError
from xllm_py.device import open_device
from xllm_py.model import load_model, open_weights, read_config

MOE: dict[str, Any] = {"model_type": "qwen3_moe", **EXPERTS}
GATE = "model.layers.1.mlp.gate.weight"
UP = "model.layers.2.mlp.experts.7.up_proj.weight"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; a positive integer"),
        ({"model_type": "mistral", "sliding_window": "4k"}, "sliding_window is 4k"),
        ({"model_type": "mistral", "sliding_window": True}, "sliding_window is true"),
        ({"model_type": "llama", "attention_bias": 1}, "attention_bias is 1; true or false"),
        ({"model_type": "llama", "mlp_bias": "yes"}, "mlp_bias is yes; true or false"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "4 heads cannot share 3 KV heads"),
        ({"model_type": "qwen3", "head_dim": 0}, "head_dim is 0; a positive integer"),
        (MOE | {"num_experts": None}, "num_experts is missing"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_experts is 8"),
        (MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size is null"),
        (MOE | {"norm_topk_prob": 1}, "norm_topk_prob is 1; true or false"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (MOE | {"mlp_only_layers": [3]}, "mlp_only_layers names 3; the layers are 0 to 2"),
        (MOE | {"mlp_only_layers": 1}, "mlp_only_layers is 1, not a list"),
        (MOE | {"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8'"),
        (MOE | {"hidden_act": "gelu"}, "hidden_act is gelu, which is not supported; known: silu"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_a_field_that_cannot_be_served_is_one_line(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    kept = {name: value for name, value in fields.items() if value is not None}
    base = {name: value for name, value in CASES["llama"].items() if name not in fields}
    folder = tmp_path / "model"
    make_family(folder, CASES["llama"])
    config = json.loads((folder / "config.json").read_text()) | base | kept
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError) as caught:
        read_config(folder)
    assert caught.value.exit_code == 3
    assert words in caught.value.message
    assert f"{folder / 'config.json'}: field " in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("window", "wanted"), [(None, (0, 0, 0)), (7, (7, 7, 7)), (1, (1, 1, 1))], ids=str
)
def test_a_window_of_mistral_counts_in_every_layer(
    tmp_path: Path, window: int | None, wanted: tuple[int, ...]
) -> None:
    fields = {"model_type": "mistral", "sliding_window": window}
    assert read_config(make_family(tmp_path, fields)).windows == wanted


def test_a_mistral_that_mentions_no_window_has_the_usual_one(tmp_path: Path) -> None:
    folder = make_family(tmp_path, {"model_type": "mistral"})
    assert read_config(folder).windows == (4096,) * 3


@pytest.mark.parametrize(
    ("step", "plain", "wanted"),
    [(1, [], {0, 1, 2}), (2, [], {1}), (1, [0, 2], {1}), (3, [2], set())],
    ids=str,
)
def test_steps_and_exceptions_say_which_layers_have_experts(
    tmp_path: Path, step: int, plain: list[int], wanted: set[int]
) -> None:
    fields = MOE | {"decoder_sparse_step": step, "mlp_only_layers": plain}
    experts = read_config(make_family(tmp_path, fields)).experts
    assert experts is not None
    assert experts.layers == wanted


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (UP, None, f"model.safetensors: has no tensor {UP}"),
        (Q_NORM, None, f"model.safetensors: has no tensor {Q_NORM}"),
        (GATE, torch.zeros(7, 64), f"tensor {GATE} has shape (7, 64), config.json implies (8, 64)"),
        (Q_NORM, torch.zeros(25), f"tensor {Q_NORM} has shape (25,), config.json implies (24,)"),
        (
            "model.layers.0.mlp.experts.8.up_proj.weight",
            torch.zeros(48, 64),
            "tensors that this model does not know: model.layers.0.mlp.experts.8.up_proj.weight",
        ),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.zeros(96),
            "tensors that this model does not know: model.layers.0.self_attn.q_proj.bias",
        ),
    ],
    ids=lambda it: it if isinstance(it, str) and " " in it else "",
)
def test_a_tensor_that_does_not_fit_is_one_line(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    folder = make_family(tmp_path, MOE)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError) as caught:
        load_model(
            read_config(folder),
            open_device("cpu:0", threads=1),
            open_weights(folder, torch.float32, "auto"),
            max_position=64,
        )
    assert caught.value.exit_code == 3
    assert words in caught.value.message
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message
