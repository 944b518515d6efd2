"""Norm, rotary positions and the gated MLP against transformers' layers and against their formulas; bits per row."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from xllm_py.device import open_device
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.norm import RmsNorm
from xllm_py.model.layers.rope import Rope, rotate

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
        assert RmsNorm(weight, 1e-5)(x).equal(theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 96, 112, 100])
def test_a_row_of_the_norm_does_not_depend_on_the_others(dtype: torch.dtype, size: int) -> None:
    norm = RmsNorm(draw(size, seed=1, dtype=dtype), 1e-6)
    x = draw(64, size, seed=2, dtype=dtype)
    whole = norm(x)
    for rows in (1, 3, 4, 17):
        assert norm(x[:rows]).equal(whole[:rows])
        assert norm(x[-rows:]).equal(whole[-rows:])


def test_a_row_of_zeros_stays_zero() -> None:
    assert not RmsNorm(torch.ones(8), 1e-6)(torch.zeros(2, 8)).any()


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
    ours = Rope(head_dim=16, theta=theta, max_position=4096, dtype=dtype)
    assert rotate(x, *ours.at(positions)).equal(theirs[0].transpose(0, 1))


def test_a_rotation_keeps_length_and_depends_on_the_distance_alone() -> None:
    rope = Rope(head_dim=32, theta=10_000.0, max_position=300, dtype=torch.float32)
    query, key = draw(1, 1, 32, seed=4), draw(1, 1, 32, seed=5)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rope.at(torch.tensor([position])))

    assert at(query, 0).equal(query)
    torch.testing.assert_close(at(query, 250).norm(), query.norm())
    products = [float((at(query, 20 + shift) * at(key, shift)).sum()) for shift in (0, 7, 200)]
    torch.testing.assert_close(
        torch.tensor(products), torch.tensor(products[:1] * 3), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [64, 100, 130])
def test_the_gated_mlp_is_its_formula(dtype: torch.dtype, wide: int) -> None:
    hidden = 48
    gate, up = (draw(wide, hidden, seed=seed, dtype=dtype) / 7 for seed in (6, 7))
    down = draw(hidden, wide, seed=8, dtype=dtype) / 10
    x = draw(8, hidden, seed=9, dtype=dtype)
    mlp = GatedMlp(open_device("cpu:0", threads=1), gate, up, down)
    exact = (part.double() for part in (x, gate, up, down))
    a, b, c, d = exact
    wanted = (functional.silu(a @ b.T) * (a @ c.T)) @ d.T
    limit = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(mlp(x).double(), wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [64, 96, 100, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_the_mlp_does_not_depend_on_the_others(
    dtype: torch.dtype, wide: int, threads: int
) -> None:
    hidden = 64
    before = torch.get_num_threads()
    try:
        device = open_device("cpu:0", threads=threads)
        mlp = GatedMlp(
            device,
            draw(wide, hidden, seed=1, dtype=dtype),
            draw(wide, hidden, seed=2, dtype=dtype),
            draw(hidden, wide, seed=3, dtype=dtype),
        )
        step = device.row_padding()
        x = draw(130 * step, hidden, seed=4, dtype=dtype)
        whole = mlp(x)
        for rows in (1, 2, 3, 9, 64, 129):
            count = rows * step
            assert mlp(x[:count]).equal(whole[:count]), f"{count} rows"
    finally:
        torch.set_num_threads(before)
