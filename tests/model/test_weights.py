"""Checkpoints as folders of tensors: whole, in shards, and every way they can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from xllm_py.base.errors import ModelLoadError
from xllm_py.device import open_device
from xllm_py.model import Model, load_model, open_weights, read_config
from xllm_py.model.weights import INDEX, DummyWeights, Weights

NORM = "model.norm.weight"


def load(folder: Path, load_format: str = "auto") -> Model:
    device = open_device("cpu:0", threads=1)
    return load_model(
        read_config(folder),
        device,
        open_weights(folder, torch.float32, load_format),
        max_position=64,
    )


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a folder with one file; None takes one away. Names have _ for the dots of `model.norm.weight`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "whole", seed=2)


def test_shards_hold_the_same_as_one_file(tmp_path: Path, folder: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", seed=2, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    whole = load_file(folder / "model.safetensors")
    weights = Weights(sharded, torch.float32)
    for name, tensor in whole.items():
        assert weights.has(name)
        assert weights.take(name, tuple(tensor.shape)).equal(tensor)
    weights.finish()


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path, shards=2)
    (sharded / INDEX).unlink()
    load(sharded)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_converted_to_the_wanted_one(folder: Path, kind: torch.dtype) -> None:
    values = torch.linspace(0.5, 2, 64).to(kind)
    rewrite(folder, **{NORM: values})
    for wanted in (torch.float32, torch.bfloat16):
        taken = Weights(folder, wanted).take(NORM, (64,))
        assert taken.dtype is wanted
        assert taken.equal(values.to(wanted))


def test_tied_models_need_no_head_and_untied_ones_do(tmp_path: Path, folder: Path) -> None:
    load(make_checkpoint(tmp_path / "tied", tied=True))
    rewrite(folder, **{"lm_head.weight": None})
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: has no tensor lm_head\.weight"):
        load(folder)


def test_a_head_beside_tied_embeddings_is_passed_over(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path, tied=True)
    rewrite(tied, **{"lm_head.weight": torch.zeros(320, 64)})
    load(tied)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, **{name: None})
    with pytest.raises(ModelLoadError, match=name):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, **{NORM: torch.ones(63)})
    with pytest.raises(ModelLoadError, match=r"norm\.weight has shape \(63,\).* implies \(64,\)"):
        load(folder)


def test_integers_where_numbers_are_expected_are_refused(folder: Path) -> None:
    rewrite(folder, **{NORM: torch.ones(64, dtype=torch.int8)})
    with pytest.raises(ModelLoadError, match=r"has dtype torch.int8, and there is no .*_scale"):
        load(folder)


def test_tensors_without_a_place_mean_another_model(folder: Path) -> None:
    rewrite(folder, **{"model.layers.2.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ModelLoadError, match="q_norm"):
        load(folder)


def test_known_leftovers_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(folder)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named_and_nothing_else_is_raised(
    tmp_path: Path, shards: int, left: float
) -> None:
    folder = make_checkpoint(tmp_path, shards=shards)
    path = sorted(folder.glob("*.safetensors"))[-1]
    raw = path.read_bytes()
    size = int(len(raw) * left) if 0 < left < 1 else int(left) % len(raw)
    path.write_bytes(raw[:size])
    with pytest.raises(ModelLoadError, match=path.name):
        load(folder)


def test_pickled_checkpoints_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelLoadError, match="pickled ones are not read"):
        load(folder)


def test_an_index_that_names_missing_files_says_which(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="not there: model-00002-of-00003"):
        load(folder)


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(tmp_path: Path, raw: str) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / INDEX).write_text(raw)
    with pytest.raises(ModelLoadError, match="index"):
        load(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    outside = make_checkpoint(tmp_path / "outside")
    folder = make_checkpoint(tmp_path / "inside", shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = "../outside/model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert (outside / "model.safetensors").exists()
    with pytest.raises(ModelLoadError, match="not there"):
        load(folder)


def test_dummy_weights_are_the_same_for_the_same_name(folder: Path) -> None:
    one, two = DummyWeights(torch.float32), DummyWeights(torch.float32)
    assert one.take("a.weight", (3, 4)).equal(two.take("a.weight", (3, 4)))
    assert not one.take("a.weight", (3, 4)).equal(one.take("b.weight", (3, 4)))
    assert one.take("a.norm.weight", (3,)).equal(torch.ones(3))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    load(folder, "dummy")
