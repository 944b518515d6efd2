from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.base.errors import InternalError
from xllm_py.core.block_manager import BlockManager, Holding


def test_blocks_come_side_by_side_when_the_cache_is_fresh() -> None:
    blocks = BlockManager(8, 4)
    assert blocks.allocate(3) == [0, 1, 2]
    assert blocks.allocate(2) == [3, 4]


def test_scattered_blocks_come_in_ascending_order() -> None:
    blocks = BlockManager(6, 4)
    held = blocks.allocate(6)
    for block in (4, 0, 2):
        blocks.free([block])
    assert held
    assert blocks.allocate(3) == [0, 2, 4]


def test_freeing_twice_is_an_error() -> None:
    blocks = BlockManager(4, 4)
    held = blocks.allocate(2)
    blocks.free(held)
    with pytest.raises(ValueError, match="FREE, not ACTIVE"):
        blocks.free(held)


def test_freeing_what_is_held_for_something_else_is_an_error() -> None:
    blocks = BlockManager(4, 4)
    staged = blocks.allocate(2, Holding.STAGED)
    with pytest.raises(ValueError, match="STAGED, not ACTIVE"):
        blocks.free(staged)


def test_more_blocks_than_are_free_are_not_given() -> None:
    blocks = BlockManager(4, 4)
    blocks.allocate(3)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        blocks.allocate(2)
    assert blocks.num_free == 1


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_a_cache_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="blocks of"):
        BlockManager(num_blocks, block_size)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_partial_block_counts_whole(tokens: int, blocks: int) -> None:
    assert BlockManager(4, 4).blocks_for(tokens) == blocks


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=60))
def test_every_block_has_one_holder_and_the_counts_agree(moves: list[tuple[int, int]]) -> None:
    blocks = BlockManager(12, 4)
    held: dict[Holding, list[list[int]]] = {holding: [] for holding in Holding}
    for kind, count in moves:
        if kind < 2 and count <= blocks.num_free:
            holding = Holding.ACTIVE if kind == 0 else Holding.STAGED
            held[holding].append(blocks.allocate(count, holding))
        elif kind == 2 and held[Holding.STAGED]:
            taken = held[Holding.STAGED].pop(count % len(held[Holding.STAGED]))
            blocks.move(taken, Holding.STAGED, Holding.QUARANTINED)
            held[Holding.QUARANTINED].append(taken)
        elif kind == 3:
            for holding in (Holding.QUARANTINED, Holding.ACTIVE):
                if held[holding]:
                    blocks.free(held[holding].pop(), holding)
                    break
        owned = [block for groups in held.values() for group in groups for block in group]
        assert len(set(owned)) == len(owned)
        counts = blocks.counts()
        assert counts["free"] == blocks.num_free == 12 - len(owned)
        assert counts["active"] == sum(map(len, held[Holding.ACTIVE]))
        assert counts["staged"] == sum(map(len, held[Holding.STAGED]))
        assert counts["quarantined"] == sum(map(len, held[Holding.QUARANTINED]))


def test_a_flush_forgets_what_nobody_uses_and_nothing_else() -> None:
    blocks = BlockManager(4, 2)
    used, idle = blocks.allocate(2)
    for block, digest in ((used, b"u"), (idle, b"i")):
        blocks.publish(block, digest, (block, block))
    blocks.free([idle])
    assert blocks.flush() == 1
    assert blocks.match([b"i"], (idle, idle)) == []
    assert blocks.match([b"u"], (used, used)) == [used]
    blocks.free([used])
    assert blocks.counts()["free"] == 3
    assert blocks.flush() == 1
    assert blocks.counts()["free"] == 4
    assert blocks.num_evicted == 0


def test_a_block_is_its_requests_or_published_with_the_hash_of_its_tokens() -> None:
    blocks = BlockManager(6, 2)
    mine = blocks.allocate(2, tag=("a", 1))
    blocks.check(mine, ("a", 1), [])
    (other,) = blocks.allocate(1, tag=("b", 1))
    blocks.publish(other, b"h", (1, 2))
    blocks.acquire([other])
    blocks.check([other, *mine], ("a", 1), [b"h"])
    for held, tag, hashes in (
        ([other, *mine], ("a", 1), [b"another"]),
        ([other, *mine], ("a", 1), []),
        (mine, ("a", 2), []),  # what an earlier attempt wrote is not this one's
    ):
        with pytest.raises(InternalError, match="does not hold"):
            blocks.check(held, tag, hashes)


def test_a_block_that_was_given_back_is_nobodys_and_then_the_next_ones() -> None:
    told: list[int] = []
    blocks = BlockManager(2, 2, told.extend)
    held = blocks.allocate(2, tag=("a", 1))
    assert told == held
    blocks.free(held[:1])
    with pytest.raises(InternalError):
        blocks.check(held, ("a", 1), [])
    assert blocks.allocate(1, tag=("b", 1)) == held[:1]
    with pytest.raises(InternalError):
        blocks.check(held, ("a", 1), [])
    assert told == [*held, held[0]]
    blocks.check(held[1:], ("a", 1), [])
    staged = blocks.allocate(0, Holding.STAGED, ("c", 1))
    blocks.check(staged, ("c", 1), [])
