"""What the compiled kernels carry is what lies there, and the checksum is the library's, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.base.hashing import payload_checksum
from xllm_py.device.cpu.native.build import build, instruction_sets
from xllm_py.device.cpu.native.library import Library

NUM_BLOCKS = 20


def memory_of(size: int, offset: int, seed: int) -> memoryview:
    """Of NUM_BLOCKS blocks, so many bytes after a multiple of 64; the kernels write past the cache only where that is 0."""
    room = np.zeros(NUM_BLOCKS * size + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    view = memoryview(room)[start : start + NUM_BLOCKS * size]
    view[:] = random.Random(seed).randbytes(view.nbytes)
    return view


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("size", [1024, 3072, 32768])
@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("blocks", [[7], [3, 4, 5, 19, 0, 7], list(range(NUM_BLOCKS))])
def test_blocks_are_carried_out_and_in(
    name: str, size: int, offset: int, blocks: list[int]
) -> None:
    library, numbers = Library(build(name), name), np.array(blocks, np.int64).data
    source, target = memory_of(size, offset, 1), memory_of(size, offset, 2)
    wanted = bytearray(target)
    for block in blocks:
        wanted[block * size : (block + 1) * size] = source[block * size : (block + 1) * size]
    content = b"".join(source[block * size : (block + 1) * size] for block in blocks)

    flat = memoryview(bytearray(len(content)))
    assert library.gather(source, numbers, flat) == payload_checksum(content)
    assert flat == content
    assert library.scatter(target, numbers, flat.toreadonly()) == payload_checksum(content)
    assert target == wanted


def test_instructions_that_the_system_keeps_back_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(xllm_allowed=Mock(return_value=0))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: refusing)
    with pytest.raises(DeviceUnavailable, match="does not let this process use amx"):
        Library(Path("some.so"), "amx")
