"""Which devices there are, and what is said of those that are not."""

from __future__ import annotations

import pytest
import torch

from tests.devices import SIMULATED
from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device import open_device
from xllm_py.device.cpu import CpuDevice


def test_the_cpu_is_opened_under_its_name_with_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert open_device("cpu:1", threads=2).name == "cpu:1"
        assert torch.get_num_threads() == 2
        assert open_device("cpu", threads=1).name == "cpu:0"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["npu:0", "cuda:0", "tpu:0", ""])
def test_a_device_that_is_not_there_is_refused_with_one_that_is(name: str) -> None:
    with pytest.raises(DeviceUnavailable, match="--devices=cpu:0") as caught:
        open_device(name, threads=1)
    assert caught.value.exit_code == 4


def test_an_npu_names_what_it_needs() -> None:
    with pytest.raises(DeviceUnavailable, match=r"torch_npu is not installed.*XLLM_SIMULATE_NPU"):
        open_device("npu:0", threads=1)


@pytest.mark.skipif(SIMULATED, reason="an npu is there")
def test_auto_takes_the_cpu_where_nothing_else_is() -> None:
    before = torch.get_num_threads()
    try:
        assert open_device("auto", threads=1).name == "cpu:0"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5, 8])
def test_torchs_kernels_pad_rows_to_a_multiple_of_the_threads_and_at_least_four(
    threads: int,
) -> None:
    before = torch.get_num_threads()
    try:
        padding = CpuDevice(0, threads=threads, kernels="torch").row_padding()
    finally:
        torch.set_num_threads(before)
    assert padding >= 4
    assert padding % threads == 0
