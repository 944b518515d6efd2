"""config.json and generation_config.json as values; a wrong or missing field is one line that names file and field.

Only what the architectures here compute; unknown fields are ignored, what would be computed wrongly is refused. What the families have
in common is read here, by `read_common`, the rest by the families. Class names and code in a model folder are never used (TRUST S27).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xllm_py.base.errors import ModelLoadError
from xllm_py.model.fields import Fields
from xllm_py.model.quantization import read_quantization
from xllm_py.model.rope_config import RopeConfig, read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The layers that choose some of many MLPs for each token."""

    count: int
    per_token: int
    intermediate_size: int  # of one expert
    normalised: bool  # the weights of a token's experts sum to 1
    layers: frozenset[int]  # which layers have experts; the others have one MLP


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
    max_position: int  # tokens it was made for, and serves unless --max_model_len says otherwise
    longest: int  # tokens its rotary scaling reaches; as a rule max_position
    rms_norm_eps: float
    rope: RopeConfig
    tied: bool
    dtype: str  # of the weights in the file: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...]  # per layer: tokens that a token sees, itself included; 0: all
    attention_bias: bool = False  # where a family lets the file choose
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    int8: bool = False  # the file's linears have 8-bit weights


def read_common(
    fields: Fields,
    *,
    windows: tuple[int, ...],
    head_dim: int | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    experts: ExpertsConfig | None = None,
) -> ModelConfig:
    """What every family has, and what the family found. head_dim: when the file has none; None: hidden size / heads.

    Raises ModelLoadError.
    """
    _refuse_unbuilt(fields)
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.refuse(
            "num_key_value_heads", f"is {kv_heads}; {heads} heads cannot share {kv_heads} KV heads"
        )
    if head_dim is None and fields.get("head_dim") is None and hidden % heads:
        fields.refuse("hidden_size", f"is {hidden}; {heads} heads cannot divide it")
    dim = fields.count("head_dim", head_dim or hidden // heads)
    if dim % 2:
        fields.refuse("head_dim", f"is {dim}; heads of {dim} have no halves to rotate")
    max_position = fields.count("max_position_embeddings")
    rope = read_rope(fields, max_position, dim)
    dtype = str(fields.get("torch_dtype") or fields.get("dtype") or "float32")
    _check_layer_types(fields, windows)
    return ModelConfig(
        model_type=fields.text("model_type"),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=fields.count("intermediate_size"),
        max_position=max_position,
        longest=rope.reach(max_position),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tied=fields.flag("tie_word_embeddings", False),
        dtype=dtype.removeprefix("torch."),
        eos_token_ids=_eos(fields),
        windows=windows,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        experts=experts,
        int8=read_quantization(fields),
    )


def no_windows(fields: Fields) -> tuple[int, ...]:
    """Every layer sees everything. Raises ModelLoadError."""
    return (0,) * fields.count("num_hidden_layers")


def switched_windows(fields: Fields, *, first_layer: int | None = None) -> tuple[int, ...]:
    """Qwen's way: `sliding_window` counts if `use_sliding_window` is set, for layers from first_layer on.

    first_layer: None lets `layer_types` or `max_window_layers` say which. Raises ModelLoadError.
    """
    layers = fields.count("num_hidden_layers")
    if not fields.flag("use_sliding_window", False):
        return (0,) * layers
    window = fields.count("sliding_window")
    kinds = fields.items("layer_types")
    if first_layer is None and kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if first_layer is None:
        # a count of 0 is a count here: all layers slide
        first_layer = (
            0 if fields.get("max_window_layers") == 0 else fields.count("max_window_layers", 28)
        )
    return tuple(window if index >= first_layer else 0 for index in range(layers))


def _check_layer_types(fields: Fields, windows: tuple[int, ...]) -> None:
    """`layer_types`, where it is there, says what the other fields say. Raises ModelLoadError."""
    kinds = fields.items("layer_types")
    layers = fields.count("num_hidden_layers")
    if kinds and len(kinds) != layers:
        fields.refuse("layer_types", f"has {len(kinds)} entries; {layers} layers need {layers}")
    for index, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"names {str(kind)[:40]!r}, which is not supported")
        if (kind == "sliding_attention") is not (windows[index] > 0):
            fields.refuse(
                "layer_types",
                f"makes layer {index} {kind}, the fields of the sliding window do not; correct one of them",
            )


def _refuse_unbuilt(fields: Fields) -> None:
    """What would be computed wrongly is named, not ignored. Raises ModelLoadError."""
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        fields.refuse(
            "hidden_act", f"is {str(activation)[:80]}, which is not supported; known: silu"
        )


def _eos(fields: Fields) -> tuple[int, ...]:
    """End tokens: the generation config's word counts before the model's."""
    path = fields.path.parent / "generation_config.json"
    for place in (*([Fields.read(path)] if path.exists() else []), fields):
        value = place.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):  # a bool is no token
            place.refuse("eos_token_id", f"is {str(value)[:80]}, no token id; correct it")
        return tuple(ids)
    return ()


def read_fields(folder: Path) -> Fields:
    """The folder's config.json. Raises ModelLoadError."""
    fields = Fields.read(folder / "config.json")
    if not isinstance(fields.get("model_type"), str):
        raise ModelLoadError(
            f"{fields.path}: field model_type is missing or no text; is this a language model?"
        )
    return fields
