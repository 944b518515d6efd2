"""Every kernel as it is launched, compiled for the GPU it is meant for (compute capability 9.0), which takes no GPU: what the interpreter does not
look at, types, shared memory and registers, must fit. Run in a process of its own, where a launch compiles and computes nothing.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from xllm_py.device.base import AttentionBatch, Drawing, HeadNorms, Turn
from xllm_py.device.cuda import drawing, launch
from xllm_py.device.paged import PagedCache

H200 = GPUTarget("cuda", 90, 32)
MOST_SHARED = 227 << 10  # bytes of one program
_READER = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class NoGpu:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return H200

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernels by name, of the launches of one test."""
    driver.set_active(NoGpu())
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **fields: Any) -> Any:
        assert not warmup
        made = run(self, *args, grid=grid, warmup=True, **fields)
        found[self.__name__] = made
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


def spilled(kernel: Any) -> int:
    """Bytes of registers that found no room."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [_READER, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    (fields,) = [line for line in told.splitlines() if "REG:" in line]
    return int(dict(word.split(":") for word in fields.split() if ":" in word)["LOCAL"])


def rand(*size: int) -> torch.Tensor:
    return torch.rand(*size).bfloat16()


def products() -> None:
    for rows, columns, width in ((1, 1152, 896), (300, 9728, 896)):
        x = rand(rows, width)
        launch.linear(x, launch.Matrix(rand(columns, width), rand(columns)), None)
        launch.linear(x, launch.Matrix(rand(width, width)), x)


def products_of_8_bits() -> None:
    values = torch.ones(1152, 896, dtype=torch.int8)
    launch.linear(rand(3, 896), launch.Matrix(values, None, torch.ones(1152)), None)


def rows() -> None:
    launch.gated(rand(3, 9728))
    launch.rms_norm(rand(3, 896), rand(896), 1e-6)


def cache(kv_heads: int, dim: int) -> PagedCache:
    return PagedCache([rand(9, 128, kv_heads, dim)], [rand(9, 128, kv_heads, dim)], 128, kv_heads)


def rotation() -> None:
    turn = Turn(cos=rand(99, 64), sin=rand(99, 64), positions=torch.arange(3))
    for norms in (None, HeadNorms(weight=rand(16, 64), eps=1e-6)):
        launch.rotate_and_store(rand(3, 18, 64), cache(2, 64), 0, turn, torch.arange(3), norms)


def attention(heads: int, kv_heads: int, dim: int, sliding: int = 0) -> Callable[[], None]:
    def attend() -> None:
        """A sequence that decodes, over several windows, and a prompt."""
        batch = AttentionBatch(
            block_tables=torch.zeros(2, 8, dtype=torch.int32),
            first_tokens=torch.tensor([0, 1]),
            num_tokens=torch.tensor([1, 200]),
            context_tokens=torch.tensor([1000, 200]),
            slots=torch.arange(201),
        )
        launch.Attention(cache(kv_heads, dim)).attend(rand(201, heads, dim), 0, batch, sliding)

    return attend


def draws() -> None:
    wanted = Drawing(
        row=0, temperature=0.8, top_k=50, top_p=0.9, min_p=0.0, numbers=np.array([0.3])
    )
    drawing.draw(torch.rand(1, 151_936), [wanted], lambda tensor: tensor)


@pytest.mark.parametrize(
    ("launches", "names"),
    [
        pytest.param(products, {"linear"}, id="products"),
        pytest.param(products_of_8_bits, {"linear"}, id="products of 8 bits"),
        pytest.param(rows, {"gated", "rms_norm"}, id="rows"),
        pytest.param(rotation, {"rotate_and_store"}, id="rotation"),
        pytest.param(attention(14, 2, 64), {"attend", "merge"}, id="attention of 0.5B"),
        pytest.param(attention(28, 4, 128, 4096), {"attend", "merge"}, id="attention of 7B"),
        pytest.param(draws, {"weigh", "keep", "pick"}, id="draws"),
    ],
)
def test_it_compiles_for_the_gpu_and_fits(
    compiled: dict[str, Any], launches: Callable[[], None], names: set[str]
) -> None:
    launches()
    assert set(compiled) == names
    for name, kernel in compiled.items():
        assert kernel.metadata.target == H200
        assert kernel.metadata.shared <= MOST_SHARED, name
        assert spilled(kernel) == 0, name
