"""Floor 4: layers, weights and one file per architecture family. `load_model` is the only door."""

from __future__ import annotations

from pathlib import Path

import torch

from xllm_py.base.errors import ModelLoadError
from xllm_py.device.base import Device
from xllm_py.model.config import ModelConfig
from xllm_py.model.qwen2 import Qwen2
from xllm_py.model.weights import DummyWeights, Weights, WeightSource

__all__ = ["Qwen2", "load_model", "pick_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(wanted: str, config: ModelConfig) -> torch.dtype:
    """`auto` takes the file's dtype. float16 is refused: CPUs emulate it 5 to 10 times slower. Raises ModelLoadError."""
    name = config.dtype if wanted == "auto" else wanted
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ModelLoadError(
            f"dtype {name} is not supported; pass --dtype=bfloat16 or --dtype=float32"
        )
    if dtype is torch.float16:
        raise ModelLoadError(
            "float16 is not supported on cpu; pass --dtype=bfloat16 or --dtype=float32"
        )
    return dtype


def load_model(
    folder: Path,
    config: ModelConfig,
    device: Device,
    *,
    dtype: torch.dtype,
    load_format: str,
    max_position: int,
) -> Qwen2:
    """Read the weights onto the device. load_format: `auto` (safetensors) or `dummy` (seeded random)."""
    weights: WeightSource = (
        DummyWeights(dtype) if load_format == "dummy" else Weights(folder, dtype)
    )
    return Qwen2(config, device, weights, max_position)
