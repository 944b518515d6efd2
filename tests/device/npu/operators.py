"""What a simulated npu refuses as the real one would, and what it computes; run by test_simulated in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device import open_device
from xllm_py.device.base import KvShape
from xllm_py.device.npu import NpuDevice
from xllm_py.device.npu.load import load


@pytest.fixture(scope="module")
def device() -> NpuDevice:
    return NpuDevice(1)


@pytest.fixture(autouse=True)
def as_the_engine_computes() -> Iterator[None]:
    with torch.inference_mode():
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_it_has_its_name_its_memory_and_its_variant(device: NpuDevice) -> None:
    assert device.name == "npu:1"
    free, total = device.memory()
    assert 0 < free <= total
    assert device.variant() == "npu simulated torch_npu simulated"
    assert open_device("auto", threads=1).name == "npu:0"


def test_one_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r"npu:2 is not there.*npu:0, npu:1"):
        NpuDevice(2)


@pytest.mark.parametrize("count", ["0", "65", "two", "-1"])
def test_a_number_of_npus_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("XLLM_SIMULATE_NPU", count)
    with pytest.raises(DeviceUnavailable, match="1 to 64"):
        load("npu:0")


def test_operands_on_two_sides_are_refused(device: NpuDevice) -> None:
    there = device.put(draw(3, 4))
    assert str(there.device) == "npu:1"
    with pytest.raises(RuntimeError, match="same device"):
        there + draw(3, 4)
    with pytest.raises(RuntimeError, match="same device"):
        there + NpuDevice(0).put(draw(3, 4))
    with pytest.raises(RuntimeError, match="same device"):
        functional.linear(there, draw(5, 4))
    assert (there * torch.tensor(2.0)).cpu().equal(draw(3, 4) * 2), "a number may lie anywhere"


def test_views_share_what_is_written(device: NpuDevice) -> None:
    there = device.put(torch.zeros(4, 6))
    there.view(-1)[3:5] = 7
    there[2:].index_copy_(0, device.put(torch.tensor([1])), device.put(torch.ones(1, 6)))
    wanted = torch.zeros(4, 6)
    wanted.view(-1)[3:5] = 7
    wanted[3] = 1
    assert there.cpu().equal(wanted)


def attention(device: NpuDevice, **changed: Any) -> Tensor:
    """One sequence of 130 tokens in blocks 2 and 0; what is changed is to be refused."""
    ops, put = load("npu:1"), device.put
    given = {
        "atten_mask": put(torch.ones(2048, 2048, dtype=torch.int8).triu(1)),
        "actual_seq_lengths": [130],
        "actual_seq_lengths_kv": [130],
        "block_table": put(torch.tensor([[2, 0]], dtype=torch.int32)),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 16**-0.5,
        "input_layout": "TND",
        "block_size": 128,
        "sparse_mode": 3,
        **changed,
    }
    result: Tensor = ops.npu_fused_infer_attention_score(
        put(draw(130, 4, 16)), put(draw(3, 128, 32)), put(draw(3, 128, 32)), **given
    )[0]
    return result.cpu()


def test_attention_is_that_of_torch(device: NpuDevice) -> None:
    cache = draw(3, 128, 32)[[2, 0]].view(256, 2, 16)[:130]
    keys = cache.repeat_interleave(2, 1).transpose(0, 1)
    queries = draw(130, 4, 16).transpose(0, 1)
    wanted = functional.scaled_dot_product_attention(queries, keys, keys, is_causal=True)
    torch.testing.assert_close(attention(device), wanted.transpose(0, 1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"input_layout": "BSH"}, "TND"),
        ({"actual_seq_lengths": [129]}, "cumulative"),
        ({"actual_seq_lengths_kv": [130, 1]}, "as many"),
        ({"block_size": 64}, "block_size"),
        ({"sparse_mode": 0}, "sparse_mode"),
        ({"atten_mask": None}, "triangle"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"num_query_heads": 4}, "num_query_heads"),
        ({"scale_value": 1.0}, "scale_value"),
    ],
    ids=str,
)
def test_attention_that_is_called_otherwise_is_refused(
    device: NpuDevice, changed: dict[str, Any], cause: str
) -> None:
    with pytest.raises(RuntimeError, match=cause):
        attention(device, **changed)


def test_a_block_that_does_not_exist_is_refused(device: NpuDevice) -> None:
    for table in ([[3, 0]], [[-1, 0]]):
        with pytest.raises(RuntimeError, match="does not exist"):
            attention(device, block_table=device.put(torch.tensor(table, dtype=torch.int32)))


@pytest.mark.parametrize(
    ("slots", "mode", "cause"),
    [
        ([0, 256], "Norm", "does not exist"),
        ([-1, 3], "Norm", "does not exist"),
        ([5, 5], "Norm", "twice"),
        ([5], "Norm", "as many"),
        ([5, 6], "PA_NZ", "laid out"),
    ],
)
def test_a_write_that_is_wrong_is_refused(
    device: NpuDevice, slots: list[int], mode: str, cause: str
) -> None:
    ops, put = load("npu:1"), device.put
    new, cache = put(draw(2, 2, 16)), put(torch.zeros(2, 128, 2, 16))
    with pytest.raises(RuntimeError, match=cause):
        ops.npu_scatter_pa_kv_cache(
            new, new, cache, cache, put(torch.tensor(slots, dtype=torch.int32)), cache_mode=mode
        )
    assert not cache.cpu().any()


def test_an_operator_without_an_npu_s_tensor_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without a tensor on an npu"):
        load("npu:1").npu_swiglu(draw(3, 4))


def test_blocks_that_attention_does_not_take_are_refused(device: NpuDevice) -> None:
    with pytest.raises(DeviceUnavailable, match="--block_size=128"):
        device.alloc_kv(
            KvShape(
                num_layers=1,
                num_blocks=2,
                block_size=64,
                kv_heads=1,
                head_dim=16,
                dtype=torch.float32,
            )
        )
