"""The host's copy of a device's cache, through a room that holds fewer blocks than are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from xllm_py.core.kv_memory import PARTS
from xllm_py.device.mirror import _AT_ONCE, HostMirror, Pinned

LAYERS, BLOCKS = 2, 3 * _AT_ONCE
MANY = (*range(0, BLOCKS, 2), 1)


class Rooms:
    """Memory that says how often somebody waited for copies."""

    def __init__(self) -> None:
        self.waits = 0
        self.is_aside = False
        self.made: list[torch.Tensor] = []

    def alloc(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.made.append(torch.empty(*size, dtype=dtype))
        return self.made[-1]

    def wait(self) -> None:
        self.waits += 1

    def mark(self) -> Callable[[], None]:
        assert self.is_aside
        return self.wait

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.is_aside = True
        yield
        self.is_aside = False


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


def make(rooms: Rooms) -> tuple[list[torch.Tensor], HostMirror]:
    numbers = torch.arange(LAYERS * PARTS * BLOCKS * 8, dtype=torch.float32)
    caches = list(numbers.view(LAYERS * PARTS, BLOCKS, 2, 2, 2))
    return caches, HostMirror(caches, Pinned(rooms.alloc, rooms.wait, rooms.mark, rooms.aside))


@pytest.mark.parametrize("blocks", [(), (5,), MANY])
def test_what_is_taken_out_is_the_layer_s_and_nothing_else(
    rooms: Rooms, blocks: tuple[int, ...]
) -> None:
    caches, mirror = make(rooms)
    finish = mirror.take_out(1, blocks)
    assert rooms.waits == 0 and not any(host.any() for host in mirror._host)
    finish()
    for place, (cache, host) in enumerate(zip(caches, mirror._host, strict=True)):
        chosen = torch.zeros(BLOCKS, dtype=torch.bool)
        if place // PARTS == 1:
            chosen[list(blocks)] = True
        assert torch.equal(host[chosen], cache[chosen])
        assert not host[~chosen].any()


def test_what_is_put_in_is_all_layers_of_these_blocks(rooms: Rooms) -> None:
    caches, mirror = make(rooms)
    for host in mirror._host:
        host.fill_(-1)
    before = [cache.clone() for cache in caches]
    mirror.put_in(MANY)
    rest = sorted(set(range(BLOCKS)) - set(MANY))
    for cache, old in zip(caches, before, strict=True):
        assert (cache[list(MANY)] == -1).all()
        assert torch.equal(cache[rest], old[rest])


def test_nobody_reads_the_room_or_fills_it_again_before_its_copies_are_done(rooms: Rooms) -> None:
    _, mirror = make(rooms)
    finishes = [mirror.take_out(0, MANY), mirror.take_out(0, MANY)]
    assert len(rooms.made) == 1 + len(finishes) * PARTS  # each has its own
    for finish in finishes:
        finish()
    assert rooms.waits == len(finishes)
    mirror.put_in(MANY)
    assert rooms.waits == len(finishes) + -(-len(MANY) // _AT_ONCE) * LAYERS
    assert len(rooms.made) == 1 + len(finishes) * PARTS
