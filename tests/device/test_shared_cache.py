"""Caches of several ranks as one: what each writes is seen in its heads, and what comes in reaches each."""

from __future__ import annotations

import os

import pytest
import torch

from xllm_py.device import open_device, shared_cache
from xllm_py.device.base import KvShape

SHAPE = KvShape(
    num_layers=2, num_blocks=3, block_size=4, kv_heads=1, head_dim=8, dtype=torch.float32
)


def mirror(heads: list[range]) -> tuple[list[list[torch.Tensor]], shared_cache.RanksMirror]:
    ranks = []
    for _ in heads:
        fd = shared_cache.create()
        ranks.append(shared_cache.caches(fd, SHAPE))
        os.close(fd)
    return ranks, shared_cache.RanksMirror(ranks, heads, SHAPE)


def test_two_mappings_of_one_memory_are_one_cache() -> None:
    fd = shared_cache.create()
    mine, theirs = shared_cache.caches(fd, SHAPE), shared_cache.caches(fd, SHAPE)
    assert len(mine) == 4
    assert not any(cache.any() for cache in mine)
    mine[3][1, 2] = 5.0
    assert theirs[3][1, 2].eq(5.0).all()
    assert not theirs[2].any()
    os.close(fd)


@pytest.mark.parametrize("heads", [[range(1), range(1, 2)], [range(1), range(1), range(1, 2)]])
def test_heads_of_all_ranks_stand_side_by_side(heads: list[range]) -> None:
    ranks, both = mirror(heads)
    for rank, caches in enumerate(ranks):
        for index, cache in enumerate(caches):
            cache[:] = 100 * heads[rank].start + index
    memory = both.memory()
    assert memory.layout.text.endswith("kv_heads=2 head_dim=8 dtype=float32")
    both.take_out(1, [2, 0])
    for part in range(2):
        for block in range(3):
            raw = bytearray(memory.span(1, part, block))
            found = torch.frombuffer(raw, dtype=torch.float32).view(4, 2, 8)
            wanted = torch.tensor([2.0 + part, 102.0 + part])[:, None] if block != 1 else 0.0
            assert found.eq(wanted).all()


def test_what_is_put_in_reaches_every_rank_that_has_the_head() -> None:
    ranks, both = mirror([range(1), range(1), range(1, 2)])
    memory = both.memory()
    whole = torch.arange(64.0).view(4, 2, 8)
    memory.span(0, 1, 2)[:] = whole.numpy().tobytes()
    both.put_in([2])
    assert ranks[0][1][2].equal(whole[:, :1])
    assert ranks[1][1][2].equal(whole[:, :1])
    assert ranks[2][1][2].equal(whole[:, 1:])
    assert not ranks[0][1][1].any()


def test_a_cpu_s_cache_may_lie_in_it() -> None:
    fd = shared_cache.create()
    device = open_device("cpu:0", threads=1, kv_fd=fd)
    device.alloc_kv(SHAPE)
    device.kv_memory().span(1, 0, 2)[:] = torch.full((4, 1, 8), 3.0).numpy().tobytes()
    assert shared_cache.caches(fd, SHAPE)[2][2].eq(3.0).all()
    device.close()
    os.close(fd)
