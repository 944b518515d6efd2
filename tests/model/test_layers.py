"""Norm, rotary positions, the gated MLP and the experts against transformers' layers and against their formulas; bits per row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from tests.checkpoints import make_checkpoint
from xllm_py.device import open_device
from xllm_py.device.torch_forms import rms_norm, rotate
from xllm_py.model import read_config
from xllm_py.model.config import ExpertsConfig, ModelConfig
from xllm_py.model.layers.experts import Experts, Router
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts
from xllm_py.model.layers.rope import Rope
from xllm_py.model.rope_config import RopeConfig

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_transformers_norm_to_the_bit(dtype: torch.dtype) -> None:
    weight = draw(96, seed=1, dtype=dtype)
    theirs = Qwen2RMSNorm(96, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        x = draw(7, 96, seed=2, dtype=dtype) * 30
        assert rms_norm(x, weight, 1e-5).equal(theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rotary_positions_are_transformers_to_the_bit(dtype: torch.dtype, theta: float) -> None:
    config = Qwen2Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.tensor([0, 1, 2, 63, 511, 512, 4095])
    x = draw(len(positions), 4, 16, seed=3, dtype=dtype)
    cos, sin = Qwen2RotaryEmbedding(config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    ours = Rope(RopeConfig(theta=theta), head_dim=16, max_position=4096, dtype=dtype)
    assert rotate(x, *ours.at(positions).here).equal(theirs[0].transpose(0, 1))


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, own bounds": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.2,
        "mscale_all_dim": 0.8,
    },
    "yarn, one dimension": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 4.0,
        "beta_slow": 4.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def config_with(tmp_path: Path, **fields: Any) -> ModelConfig:
    folder = make_checkpoint(tmp_path, head_dim=32, max_position=4096)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return read_config(folder)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_scaled_positions_are_transformers_to_the_bit(
    tmp_path: Path, kind: str, field: str, head_dim: int
) -> None:
    scaling = dict(SCALED[kind])
    if field == "rope_scaling":  # as older files have it
        scaling["type"] = scaling.pop("rope_type")
    config = config_with(tmp_path, rope_theta=5e5, head_dim=head_dim, **{field: scaling})
    theirs = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={**SCALED[kind], "rope_theta": 5e5},
    )
    positions = torch.tensor([0, 1, 2, 63, 511, 512, 2049, 4095])
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    rope = Rope(config.rope, head_dim=head_dim, max_position=4096, dtype=torch.float32)
    ours = rope.at(positions).here
    assert ours[0].squeeze(1).equal(cos[0])
    assert ours[1].squeeze(1).equal(sin[0])
    plain = Rope(RopeConfig(theta=5e5), head_dim=head_dim, max_position=4096, dtype=torch.float32)
    assert plain.at(positions).here[0].equal(ours[0]) is (kind == "dynamic")


def test_dynamic_positions_are_those_of_the_longest_sequence_served(tmp_path: Path) -> None:
    config = config_with(tmp_path, rope_scaling=SCALED["dynamic"])
    assert (config.max_position, config.longest) == (4096, 16384)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            max_position_embeddings=4096,
            rope_parameters={**SCALED["dynamic"], "rope_theta": 10_000.0},
        )
    )
    whole = torch.arange(10_000)
    cos, _ = theirs(torch.zeros(1), whole[None])
    rope = Rope(config.rope, head_dim=32, max_position=10_000, dtype=torch.float32)
    torch.testing.assert_close(rope.at(whole).here[0].squeeze(1), cos[0], atol=2e-3, rtol=0)
    shorter = Rope(config.rope, head_dim=32, max_position=5_000, dtype=torch.float32)
    assert not shorter.at(whole[:5000]).here[0].equal(rope.at(whole[:5000]).here[0])
    assert config.rope.variant(4096) == ""
    assert config.rope.variant(10_000) != config.rope.variant(5_000)


@pytest.mark.parametrize(
    ("kind", "longest"),
    [("linear", 10240), ("yarn", 4096), ("yarn, mscale", 163840), ("llama3", 4096)],
)
def test_a_scaling_says_how_far_it_reaches(tmp_path: Path, kind: str, longest: int) -> None:
    config = config_with(tmp_path, rope_scaling=SCALED[kind])
    assert (config.max_position, config.longest) == (4096, longest)
    assert config.rope.variant(longest) == ""


def test_a_rotation_keeps_length_and_depends_on_the_distance_alone() -> None:
    rope = Rope(RopeConfig(), head_dim=32, max_position=300, dtype=torch.float32)
    query, key = draw(1, 1, 32, seed=4), draw(1, 1, 32, seed=5)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rope.at(torch.tensor([position])).here)

    assert at(query, 0).equal(query)
    torch.testing.assert_close(at(query, 250).norm(), query.norm())
    products = [float((at(query, 20 + shift) * at(key, shift)).sum()) for shift in (0, 7, 200)]
    torch.testing.assert_close(
        torch.tensor(products), torch.tensor(products[:1] * 3), atol=1e-4, rtol=0
    )


class Given:
    """Tensors by name, as a WeightSource."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def take(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> torch.Tensor:
        tensor = self._tensors[name.replace(".", "_")]
        assert tuple(tensor.shape) == shape
        return tensor[part]

    def has(self, name: str) -> bool:
        return name.replace(".", "_") in self._tensors

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        assert not ignored


def parts_of(tmp_path: Path, hidden: int, threads: int = 1, **tensors: torch.Tensor) -> Parts:
    """Parts over these tensors; names have _ for dots."""
    config = read_config(make_checkpoint(tmp_path, hidden_size=hidden, head_dim=8))
    return Parts(config, open_device("cpu:0", threads=threads), Given(**tensors))


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [64, 100, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_mlp_is_its_formula(
    tmp_path: Path, dtype: torch.dtype, wide: int, bias: bool
) -> None:
    hidden = 48
    tensors = {
        "m_gate_proj_weight": draw(wide, hidden, seed=6, dtype=dtype) / 7,
        "m_up_proj_weight": draw(wide, hidden, seed=7, dtype=dtype) / 7,
        "m_down_proj_weight": draw(hidden, wide, seed=8, dtype=dtype) / 10,
        "m_gate_proj_bias": draw(wide, seed=10, dtype=dtype),
        "m_up_proj_bias": draw(wide, seed=11, dtype=dtype),
        "m_down_proj_bias": draw(hidden, seed=12, dtype=dtype),
    }
    x = draw(8, hidden, seed=9, dtype=dtype)
    mlp = GatedMlp(parts_of(tmp_path, hidden, **tensors), "m", wide, bias=bias)
    a, b, c, d, e, f, g = (part.double() for part in (x, *tensors.values()))
    if not bias:
        e, f, g = (torch.zeros_like(part) for part in (e, f, g))
    wanted = (functional.silu(a @ b.T + e) * (a @ c.T + f)) @ d.T + g
    limit = 1e-5 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(mlp(x, 8).double(), wanted, atol=limit, rtol=limit)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [64, 96, 100, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_the_mlp_does_not_depend_on_the_others(
    tmp_path: Path, dtype: torch.dtype, wide: int, threads: int
) -> None:
    hidden = 64
    parts = parts_of(
        tmp_path,
        hidden,
        threads,
        m_gate_proj_weight=draw(wide, hidden, seed=1, dtype=dtype),
        m_up_proj_weight=draw(wide, hidden, seed=2, dtype=dtype),
        m_down_proj_weight=draw(hidden, wide, seed=3, dtype=dtype),
    )
    mlp = GatedMlp(parts, "m", wide)
    step = parts.device.row_padding()
    x = draw(130 * step, hidden, seed=4, dtype=dtype)
    whole = mlp(x, len(x))
    for rows in (1, 2, 3, 9, 64, 129):
        count = rows * step
        assert mlp(x[:count], count).equal(whole[:count]), f"{count} rows"


# ---- experts ----


def experts_of(
    tmp_path: Path, config: ExpertsConfig, dtype: torch.dtype, threads: int = 1
) -> tuple[Experts, Parts, dict[str, torch.Tensor]]:
    hidden, wide = 64, config.intermediate_size
    tensors = {"m_gate_weight": draw(config.count, hidden, seed=1, dtype=dtype)}
    for i in range(config.count):
        at = f"m_experts_{i}"
        tensors[f"{at}_gate_proj_weight"] = draw(wide, hidden, seed=3 * i + 2, dtype=dtype) / 8
        tensors[f"{at}_up_proj_weight"] = draw(wide, hidden, seed=3 * i + 3, dtype=dtype) / 8
        tensors[f"{at}_down_proj_weight"] = draw(hidden, wide, seed=3 * i + 4, dtype=dtype) / 8
    parts = parts_of(tmp_path, hidden, threads, **tensors)
    return Experts(parts, "m", config), parts, tensors


def experts_config(normalised: bool = True, per_token: int = 2, wide: int = 100) -> ExpertsConfig:
    return ExpertsConfig(
        count=8,
        per_token=per_token,
        intermediate_size=wide,
        normalised=normalised,
        layers=frozenset({0}),
    )


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("per_token", [1, 2, 3, 8])
def test_the_experts_are_their_formula_token_by_token(
    tmp_path: Path, normalised: bool, per_token: int
) -> None:
    config = experts_config(normalised, per_token)
    experts, _, named = experts_of(tmp_path, config, torch.float32)
    x = draw(12, 64, seed=40)
    got = experts(x, 9)
    assert not got[9:].any()
    tensors = {name: tensor.double() for name, tensor in named.items()}
    for row in range(9):
        token = x[row].double()
        shares = (tensors["m_gate_weight"] @ token).softmax(0)
        values, chosen = shares.topk(per_token)
        wanted = torch.zeros(64, dtype=torch.float64)
        for value, expert in zip(values, chosen.tolist(), strict=True):
            at = f"m_experts_{expert}"
            gate = tensors[f"{at}_gate_proj_weight"] @ token
            up = tensors[f"{at}_up_proj_weight"] @ token
            down = tensors[f"{at}_down_proj_weight"] @ (functional.silu(gate) * up)
            wanted += down * (value / values.sum() if normalised else value)
        torch.testing.assert_close(got[row].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wide", [33, 96])
def test_a_token_of_the_experts_does_not_depend_on_the_others(
    tmp_path: Path, dtype: torch.dtype, threads: int, wide: int
) -> None:
    experts, parts, _ = experts_of(tmp_path, experts_config(wide=wide), dtype, threads)
    step = parts.device.row_padding()
    x = draw(60 * step, 64, seed=41, dtype=dtype)
    whole = experts(x, len(x))
    backwards = experts(x.flip(0), len(x)).flip(0)
    assert backwards.equal(whole)
    for real in (1, 2, 3, 5, 17, 33, 111):
        for first in (0, 7):
            rows = functional.pad(x[first : first + real], (0, 0, 0, -real % step))
            assert experts(rows, real)[:real].equal(whole[first : first + real]), (first, real)


def test_of_equal_experts_the_lower_number_is_chosen(tmp_path: Path) -> None:
    tensors = {"g_weight": torch.ones(8, 64)}
    tensors["g_weight"][5] = 2.0
    router = Router(parts_of(tmp_path, 64, **tensors), "g", experts_config(per_token=3))
    chosen, weights = router(torch.full((4, 64), 0.01))
    assert chosen.tolist() == [[0, 1, 5]] * 4
    assert (weights[:, 2] > weights[:, 0]).all()
    assert weights[:, 0].equal(weights[:, 1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
