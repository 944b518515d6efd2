"""config.json and generation_config.json as values; a wrong or missing field is one line that names file and field.

Only what the architectures here read; unknown fields are ignored, unknown model types are refused. Class names and code in a
model folder are never used (TRUST S27).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_py.base.errors import ModelLoadError

MODEL_TYPES = ("qwen2",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    dtype: str  # of the weights in the file: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]


def read_config(folder: Path) -> ModelConfig:
    """Read the folder's two files. Raises ModelLoadError."""
    fields = _Fields(folder / "config.json")
    model_type = fields.text("model_type")
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ModelLoadError(
            f"{fields.path}: model_type {model_type} is not supported; known: {known}"
        )
    _refuse_unbuilt(fields)
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelLoadError(f"{fields.path}: {heads} heads cannot share {kv_heads} KV heads")
    head_dim = fields.count("head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelLoadError(f"{fields.path}: heads of {head_dim} have no halves to rotate")
    dtype = str(fields.raw.get("torch_dtype") or fields.raw.get("dtype") or "float32")
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        max_position=fields.count("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields),
        tied=bool(fields.raw.get("tie_word_embeddings", False)),
        dtype=dtype.removeprefix("torch."),
        eos_token_ids=_eos(folder, fields),
    )


def _refuse_unbuilt(fields: _Fields) -> None:
    """What would be computed wrongly is named, not ignored. Raises ModelLoadError."""
    raw = fields.raw
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelLoadError(f"{fields.path}: rope_parameters is not a JSON object")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        raise ModelLoadError(f"{fields.path}: layer_types is not a list")
    found = {
        "rope_scaling": raw.get("rope_scaling"),
        "rope_parameters.rope_type": _other(rope.get("rope_type", rope.get("type")), "default"),
        "rope_parameters.partial_rotary_factor": _other(rope.get("partial_rotary_factor"), 1),
        "use_sliding_window": raw.get("use_sliding_window"),
        "layer_types": next((kind for kind in layers if kind != "full_attention"), None),
        "hidden_act": _other(raw.get("hidden_act"), "silu"),
        "quantization_config": raw.get("quantization_config"),
    }
    for name, value in found.items():
        if value:
            raise ModelLoadError(
                f"{fields.path}: {name} {json.dumps(value)[:80]} is not supported yet; use another model"
            )


def _other(value: Any, known: Any) -> Any:
    """The value when it is there and not the known one."""
    return None if value == known else value


def _rope_theta(fields: _Fields) -> float:
    """Newer files keep it in `rope_parameters`."""
    nested = _Fields(fields.path, fields.raw.get("rope_parameters") or {})
    return nested.number("rope_theta", fields.number("rope_theta", 10000.0))


def _eos(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """End tokens: the generation config's word counts before the model's."""
    path = folder / "generation_config.json"
    value = _Fields(path).raw.get("eos_token_id") if path.exists() else None
    if value is None:
        value = fields.raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):  # a bool is no token
        raise ModelLoadError(f"{fields.path}: eos_token_id {value} is no token id")
    return tuple(ids)


class _Fields:
    """Typed access to one JSON object."""

    def __init__(self, path: Path, raw: Any = None) -> None:
        self.path = path
        self.raw: dict[str, Any] = self._read() if raw is None else raw

    def _read(self) -> dict[str, Any]:
        path = self.path
        try:
            raw: Any = json.loads(path.read_text())
        except OSError as error:
            raise ModelLoadError(
                f"{path}: cannot be read ({error.strerror}); is this a model folder?"
            ) from error
        except ValueError as error:
            raise ModelLoadError(
                f"{path}: is not JSON ({error}); copy the model folder again"
            ) from error
        if not isinstance(raw, dict):
            raise ModelLoadError(f"{path}: is not a JSON object; copy the model folder again")
        return raw

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str):
            raise ModelLoadError(f"{self.path}: field {name} is missing or no text")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(
                f"{self.path}: field {name} is {value}; a positive integer is needed"
            )
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ModelLoadError(
                f"{self.path}: field {name} is {value}; a positive number is needed"
            )
        return float(value)
