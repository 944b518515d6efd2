"""The KV cache as bytes: which bytes a list of blocks names, and which lists name none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory, in_pieces

LAYOUT = KvLayout(num_layers=2, block_size=1, block_bytes=4, shape="test")
NUM_BLOCKS = 8


def make_memory() -> KvMemory:
    """Every byte says which one it is."""
    size = NUM_BLOCKS * LAYOUT.block_bytes
    regions = [
        memoryview(bytearray(range(index * size, (index + 1) * size)))
        for index in range(LAYOUT.num_layers * PARTS)
    ]
    return KvMemory(LAYOUT, NUM_BLOCKS, regions)


MEMORY = make_memory()


@given(
    st.integers(0, LAYOUT.num_layers - 1),
    st.integers(0, PARTS - 1),
    st.lists(st.integers(0, NUM_BLOCKS - 1)),
)
def test_spans_are_the_blocks_in_their_order(layer: int, part: int, blocks: list[int]) -> None:
    MEMORY.check(layer, tuple(blocks))
    whole = b"".join(MEMORY.spans(layer, part, tuple(blocks)))
    assert whole == b"".join(MEMORY.span(layer, part, block) for block in blocks)


def test_adjacent_blocks_are_one_view() -> None:
    lengths = [view.nbytes for view in MEMORY.spans(0, 0, (2, 3, 4, 1, 7, 6))]
    assert lengths == [12, 4, 4, 4]


def test_a_view_leads_into_the_cache_itself() -> None:
    memory = make_memory()
    memory.spans(1, 0, (5, 6))[0][:] = bytes(8)
    assert bytes(memory.span(1, 0, 5, 2)) == bytes(8)
    assert bytes(memory.spans(1, 0, (6,))[0]) == bytes(4)


def test_a_block_is_also_so_many_smaller_ones() -> None:
    layout = KvLayout(num_layers=1, block_size=8, block_bytes=32, shape="test")
    memory = KvMemory(layout, 3, [memoryview(bytearray(range(96))) for _ in range(PARTS)])
    fine = memory.at(2)
    assert (fine.num_blocks, fine.layout.block_size, fine.layout.block_bytes) == (12, 2, 8)
    assert fine.layout.fingerprint == layout.fingerprint
    assert in_pieces((2, 0), 4) == (8, 9, 10, 11, 0, 1, 2, 3)
    whole = b"".join(memory.spans(0, 1, (2, 0)))
    assert b"".join(fine.spans(0, 1, in_pieces((2, 0), 4))) == whole
    assert memory.at(8) is memory
    assert memory.at(2) is fine
    for size in (0, -2, 3, 16):
        with pytest.raises(ValueError, match="are not made of"):
            memory.at(size)


@pytest.mark.parametrize("blocks", [(NUM_BLOCKS,), (-1,), (0, 1, NUM_BLOCKS, 2)])
def test_blocks_outside_the_cache_have_no_bytes(blocks: tuple[int, ...]) -> None:
    for _ in range(2):  # what was refused once is refused again
        with pytest.raises(IndexError):
            MEMORY.spans(0, 0, blocks)
        with pytest.raises(IndexError):
            MEMORY.check(0, blocks)


@pytest.mark.parametrize(("layer", "part"), [(LAYOUT.num_layers, 0), (-1, 0), (0, PARTS), (0, -1)])
def test_there_are_so_many_layers_and_two_parts(layer: int, part: int) -> None:
    with pytest.raises(IndexError):
        MEMORY.spans(layer, part, (0,))


def test_poison_fills_these_blocks_and_no_others() -> None:
    memory, before = make_memory(), make_memory()
    memory.poison([6, 2])
    for layer in range(LAYOUT.num_layers):
        for part in range(PARTS):
            for block in range(NUM_BLOCKS):
                same = bytes(memory.span(layer, part, block)) == before.span(layer, part, block)
                assert same == (block not in (2, 6))
    assert bytes(memory.span(1, 1, 6)) == b"\x7f" * 4
