"""Who owns which KV block. The one owner of the cache's map; the scheduler is its only caller.

    free ----allocate----> active | staged ----free------> free
                                     '-----quarantine----> quarantined ----release----> free

active: held by a running or giving request · staged: held by a reservation that a peer may write · quarantined: given up,
but the transport has not yet said that nothing can be written any more. Blocks are plain numbers from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Holding(IntEnum):
    """What a block is used for; every block is in exactly one of these."""

    FREE = 0
    ACTIVE = 1
    STAGED = 2
    QUARANTINED = 3


class BlockManager:
    """Hands out blocks; raises ValueError when somebody frees what is not theirs."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack whose top is the lowest number at first, so that a request's blocks tend to lie side by side
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holding = [Holding.FREE] * num_blocks
        self._counts = [num_blocks, 0, 0, 0]

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, holding: Holding = Holding.ACTIVE) -> list[int]:
        """Take `count` blocks. Raises ValueError when there are not enough: ask `num_free` first."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        if count > 1:
            self._sort_top(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holding[block] = holding
        self._counts[Holding.FREE] -= count
        self._counts[holding] += count
        return taken

    def _sort_top(self, count: int) -> None:
        """Ascending numbers in one request let the KV link merge neighbours into one frame."""
        top = self._free[-count:]
        top.sort(reverse=True)
        self._free[-count:] = top

    def move(self, blocks: Sequence[int], source: Holding, target: Holding) -> None:
        """Change what blocks are held for. Raises ValueError when one is not held as `source`."""
        for block in blocks:
            if self._holding[block] is not source:
                raise ValueError(f"block {block} is {self._holding[block].name}, not {source.name}")
            self._holding[block] = target
        self._counts[source] -= len(blocks)
        self._counts[target] += len(blocks)
        if target is Holding.FREE:
            self._free.extend(reversed(blocks))

    def free(self, blocks: Sequence[int], holding: Holding = Holding.ACTIVE) -> None:
        """Give blocks back."""
        self.move(blocks, holding, Holding.FREE)

    def counts(self) -> dict[str, int]:
        """The ledger's line: total = free + active + cached + staged + quarantined."""
        free, active, staged, quarantined = self._counts
        return {
            "total": self.num_blocks,
            "free": free,
            "active": active,
            "cached": 0,
            "staged": staged,
            "quarantined": quarantined,
        }
