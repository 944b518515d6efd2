"""The name of a model folder: other for everything that makes it another model."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import make_checkpoint
from xllm_py.model.fingerprint import model_fingerprint


def test_the_models_name_depends_on_config_dtype_weights_tokenizer_and_template(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=True)
    names = [
        model_fingerprint(folder, torch.float32),
        model_fingerprint(folder, torch.bfloat16),
    ]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text() + " ")
        names.append(model_fingerprint(folder, torch.float32))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    names.append(model_fingerprint(folder, torch.float32))
    (folder / "more.safetensors").write_bytes(b"x")
    names.append(model_fingerprint(folder, torch.float32))
    assert len(set(names)) == len(names) == 7
    assert model_fingerprint(folder, torch.float32) == names[-1]


def test_other_weights_in_files_of_the_same_size_are_another_model(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", seed=1)
    tuned = make_checkpoint(tmp_path / "tuned", seed=2)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, tuned)]
    assert sizes[0] == sizes[1]
    assert model_fingerprint(base, torch.float32) != model_fingerprint(tuned, torch.float32)
