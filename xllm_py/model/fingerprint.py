"""What a model folder is called among instances: those that share KV must have the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from xllm_py.base.hashing import fingerprint

_SAMPLES = 64  # of each weight file
_SAMPLE_BYTES = 4096


def model_fingerprint(folder: Path, dtype: torch.dtype, variant: str = "") -> str:
    """Hash of config, weight files by name, size and samples, tokenizer and template (SPEC 4.2).

    variant: what the flags make of the files beyond the dtype; instances that differ in it share no KV.

    The samples tell a fine-tuned checkpoint from its base, whose files have the same names and sizes.
    """
    parts = [f"{dtype} {variant}".rstrip()]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        parts.append(hashlib.blake2b(path.read_bytes()).hexdigest() if path.exists() else "")
    files = sorted(folder.glob("*.safetensors*"))
    return fingerprint(*parts, *(f"{path.name}:{_sampled(path)}" for path in files))


def _sampled(path: Path) -> str:
    """Size, and a hash of pieces spread over the file."""
    size, hashed = path.stat().st_size, hashlib.blake2b()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            hashed.update(file.read(_SAMPLE_BYTES))
    return f"{size}:{hashed.hexdigest()}"
