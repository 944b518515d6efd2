"""Floor 4: layers, weights and one file per family. `read_config` and `load_model` are the only doors; FAMILIES is the only list."""

from __future__ import annotations

from pathlib import Path

import torch

from xllm_py.base.errors import ModelLoadError
from xllm_py.device.base import Device
from xllm_py.model.base import Model
from xllm_py.model.config import ModelConfig, read_fields
from xllm_py.model.decoder import Decoder
from xllm_py.model.llama import Llama
from xllm_py.model.mistral import Mistral
from xllm_py.model.quantization import W8A8
from xllm_py.model.qwen2 import Qwen2
from xllm_py.model.qwen3 import Qwen3
from xllm_py.model.qwen3_moe import Qwen3Moe
from xllm_py.model.sharding import Shard
from xllm_py.model.weights import DummyWeights, Weights, WeightSource

__all__ = ["FAMILIES", "Model", "load_model", "open_weights", "pick_dtype", "read_config"]

FAMILIES: dict[str, type[Decoder]] = {  # by config.json's model_type
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder's config.json and generation_config.json. Raises ModelLoadError."""
    fields = read_fields(folder)
    kind = fields.text("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        fields.refuse("model_type", f"is {kind[:80]!r}, which is not supported; known: {known}")
    return FAMILIES[kind].read(fields)


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


def open_weights(folder: Path, dtype: torch.dtype, load_format: str) -> WeightSource:
    """load_format: `auto` (safetensors) or `dummy` (seeded random)."""
    return DummyWeights(dtype) if load_format == "dummy" else Weights(folder, dtype)


def load_model(
    config: ModelConfig,
    device: Device,
    weights: WeightSource,
    *,
    max_position: int,
    quantization: str = "",
    shard: Shard | None = None,
) -> Model:
    """Read the weights, of a rank its share, onto the device. Raises ModelLoadError, and UsageError when the model cannot be shared out.

    quantization: `w8a8` makes 8-bit linears of the file's; empty: they stay what they are.
    """
    shard = shard or Shard()
    shard.check(config)
    return FAMILIES[config.model_type](
        config, device, weights, max_position, int8=quantization == W8A8, shard=shard
    )
