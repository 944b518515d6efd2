"""Scattered pieces through one buffer: the bytes are those of the blocks in their order, whoever copies them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS, Carrier, KvLayout, KvMemory
from xllm_py.device.cpu.native.build import build, instruction_sets
from xllm_py.device.cpu.native.library import Library
from xllm_py.transport.stage import MAX_PIECE_BYTES, MIN_PIECES, Stage
from xllm_py.wire import codec

NUM_BLOCKS = 64


def native() -> Carrier | None:
    try:
        return Library(build(instruction_sets()[0]), "")
    except DeviceUnavailable:  # no compiler: the library's own way is all there is
        return None


def make_memory(block_bytes: int, carrier: Carrier | None = None, seed: int = 1) -> KvMemory:
    layout = KvLayout(num_layers=2, block_size=1, block_bytes=block_bytes, shape="test")
    source = random.Random(seed)
    regions = [
        memoryview(bytearray(source.randbytes(NUM_BLOCKS * block_bytes)))
        for _ in range(layout.num_layers * PARTS)
    ]
    return KvMemory(layout, NUM_BLOCKS, regions, carrier=carrier)


@pytest.fixture(scope="module", params=["library", "native"])
def carrier(request: pytest.FixtureRequest) -> Carrier | None:
    return native() if request.param == "native" else None


@given(
    blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS, unique=True),
    layer=st.integers(0, 1),
    part=st.integers(0, PARTS - 1),
    block_bytes=st.sampled_from([1, 63, 64, 65, 200, 1024, 1536, 4096, 5120]),
)
def test_what_is_gathered_is_what_spans_give_and_scatters_back(
    carrier: Carrier | None, blocks: list[int], layer: int, part: int, block_bytes: int
) -> None:
    memory, ids = make_memory(block_bytes, carrier), tuple(blocks)
    stage = Stage(memory)
    found, checksum = stage.gather(layer, part, ids)
    wanted = b"".join(memory.spans(layer, part, ids))
    assert b"".join(found) == wanted
    assert checksum == payload_checksum(wanted)
    room = memoryview(bytearray(len(wanted)))
    assert stage.lift(layer, part, ids, room) == checksum
    assert room == wanted
    other = make_memory(block_bytes, carrier, seed=2)
    before = b"".join(other.spans(1 - layer, part, tuple(range(NUM_BLOCKS))))
    assert Stage(other).land(layer, part, ids, memoryview(wanted)) == checksum
    unchanged = make_memory(block_bytes, seed=2)
    for block in range(NUM_BLOCKS):
        source = memory if block in ids else unchanged
        assert other.span(layer, part, block) == source.span(layer, part, block)
    assert b"".join(other.spans(1 - layer, part, tuple(range(NUM_BLOCKS)))) == before


def test_few_or_large_or_adjacent_pieces_stay_where_they_are() -> None:
    stage = Stage(make_memory(4096))
    assert stage.wants(tuple(range(0, 2 * MIN_PIECES, 2)))
    assert not stage.wants(tuple(range(0, 2 * (MIN_PIECES - 1), 2)))
    assert not stage.wants(tuple(range(NUM_BLOCKS)))
    assert not Stage(make_memory(MAX_PIECE_BYTES + 1)).wants(tuple(range(0, NUM_BLOCKS, 2)))


def test_a_full_stage_takes_no_more_until_it_is_cleared() -> None:
    memory = make_memory(MAX_PIECE_BYTES)
    stage, ids = Stage(memory), tuple(range(0, NUM_BLOCKS, 2))
    num_bytes = len(ids) * MAX_PIECE_BYTES
    for _ in range(2 * codec.FRAME_BYTES // num_bytes):
        assert len(stage.gather(0, 0, ids)[0]) == 1
    assert len(stage.gather(0, 0, ids)[0]) == len(ids)
    stage.clear()
    assert len(stage.gather(0, 0, ids)[0]) == 1


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError):
        Stage(make_memory(64)).gather(0, 0, tuple(range(NUM_BLOCKS + 1)))
    memory = make_memory(1024, native())
    with pytest.raises(IndexError):
        Stage(memory).land(0, 0, (NUM_BLOCKS,), memoryview(bytes(1024)))
    with pytest.raises(IndexError):
        Stage(memory).lift(2, 0, (0,), memoryview(bytearray(1024)))
