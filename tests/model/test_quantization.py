"""8-bit models: made at load or read from a file, they are the same model; what else calls itself quantised is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import QUANTIZATION, make_checkpoint, make_int8
from tests.families import CASES, make_family
from tests.forward import our_logits
from xllm_py.base.errors import ModelLoadError
from xllm_py.model import read_config
from xllm_py.model.quantization import quantize

PROMPT = list(range(3, 80))


def test_a_row_is_its_integers_times_its_scale_as_near_as_half_a_step() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    weight[4] = 0
    found = quantize(weight)
    assert found.values.dtype is torch.int8
    assert int(found.values.abs().max()) == 127
    again = found.values * found.scales[:, None]
    assert ((again - weight).abs() <= found.scales[:, None] / 2 + 1e-7).all()
    assert not again[4].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_made_at_load_or_read_from_a_file_it_is_the_same_model(tmp_path: Path, dtype: str) -> None:
    plain = make_checkpoint(tmp_path / "plain", seed=4, dtype=dtype)
    stored = make_int8(make_checkpoint(tmp_path / "stored", seed=4, dtype=dtype))
    assert read_config(stored).int8
    made = our_logits(plain, PROMPT, quantization="w8a8")
    assert our_logits(stored, PROMPT).equal(made)
    whole = our_logits(plain, PROMPT)
    assert not whole.equal(made)
    cosine = torch.nn.functional.cosine_similarity(whole, made, dim=-1)
    assert float(cosine.min()) > 0.99


@pytest.mark.parametrize("family", sorted(CASES))
def test_families_with_routers_and_biases_have_8_bit_forms_too(tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path, CASES[family])
    whole, made = our_logits(folder, PROMPT), our_logits(folder, PROMPT, quantization="w8a8")
    cosine = torch.nn.functional.cosine_similarity(whole, made, dim=-1)
    assert 0.98 < float(cosine.median()) < 1.0


def refused(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        our_logits(folder, PROMPT)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("quant_method",), "gptq", "quant_method is 'gptq'; known: compressed-tensors"),
        (("config_groups",), None, "config_groups is missing"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (("config_groups", "group_0", "weights", "num_bits"), 4, "weights.num_bits is 4"),
        (("config_groups", "group_0", "weights", "strategy"), "group", "only 'channel'"),
        (("config_groups", "group_0", "input_activations"), None, "input_activations is missing"),
        (("config_groups", "group_0", "input_activations", "dynamic"), False, "only True"),
    ],
)
def test_another_kind_of_quantisation_is_refused_by_its_field(
    tmp_path: Path, where: tuple[str, ...], value: Any, words: str
) -> None:
    folder = make_int8(make_checkpoint(tmp_path, seed=4))
    config = json.loads((folder / "config.json").read_text())
    changed = copy.deepcopy(QUANTIZATION)
    place: Any = changed
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
    assert words in refused(folder)


def test_a_group_of_linears_is_8_bit_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = make_int8(make_checkpoint(tmp_path, seed=4))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name] * tensors.pop(f"{name}_scale")
    save_file(tensors, path)
    assert "all or none of them must" in refused(folder)


def test_integers_that_nobody_announced_are_refused(tmp_path: Path) -> None:
    folder = make_int8(make_checkpoint(tmp_path, seed=4))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "has dtype torch.int8" in refused(folder)
