"""Who owns which KV block. The one owner of the cache's map; the scheduler and its parts are its only callers.

    free ----allocate----> active | staged ----free------> free, or cached when it was published
                                     '-----quarantine----> quarantined ----release----> free
    cached --acquire--> active | staged;  cached --evicted, least recently used first--> free

active: held by running or giving requests · staged: held by a reservation that a peer may write · quarantined: given up, but
the transport has not yet said that nothing can be written any more · cached: held by the prefix cache alone. A published block
holds a full block of known tokens, never changes, and may have many holders; it counts once, active before staged. All others
have one. Blocks are plain numbers from 0.

Each block also has a tag, the request that it was allocated for; `check` compares what a request believes to hold with tags and
hashes before it is computed.

The prefix cache is the map from chained hashes to published blocks (base/hashing). A hit compares the token ids too, so that
equal hashes of other tokens are no hit. Source: Kwon et al. 2023, PagedAttention, section 4.4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import IntEnum

from xllm_py.base.errors import InternalError

Tag = tuple[str, int]  # request, attempt
_NOBODY: Tag = ("", 0)


class Holding(IntEnum):
    """What a block is used for; every block is in exactly one of these."""

    FREE = 0
    ACTIVE = 1
    STAGED = 2
    QUARANTINED = 3
    CACHED = 4


class BlockManager:
    """Hands out blocks; raises ValueError when somebody frees what is not theirs."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        on_fresh: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """on_fresh: told of blocks that are allocated, before anybody can write them."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack whose top is the lowest number at first, so that a request's blocks tend to lie side by side
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holding = [Holding.FREE] * num_blocks
        self._tags = [_NOBODY] * num_blocks
        self._on_fresh = on_fresh
        self._counts = [num_blocks, 0, 0, 0, 0]
        # holders of a block, as (active, staged); only blocks with more than one, the others have what `_holding` says
        self._shared: dict[int, list[int]] = {}
        self._by_hash: dict[bytes, int] = {}
        self._published: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # cached blocks, the next to be evicted in front
        self.num_evicted = 0
        self._detained: list[int] | None = None  # given back, and not yet free
        self._changes: dict[bytes, bool] = {}  # hashes published or forgotten since the last look

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(
        self, count: int, holding: Holding = Holding.ACTIVE, tag: Tag = _NOBODY
    ) -> list[int]:
        """Take `count` blocks. Raises ValueError when there are not enough: ask `num_free` first."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} free")
        while len(self._free) < count:
            self._evict()
        if count > 1:
            self._sort_top(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._hold(block, holding)
            self._tags[block] = tag
        if self._on_fresh is not None:
            self._on_fresh(taken)
        return taken

    def check(self, blocks: Sequence[int], tag: Tag, hashes: Sequence[bytes]) -> None:
        """Every block of a request is held by somebody, and is its own or published with its hash. Raises InternalError: the map of the
        cache is wrong, and what is computed from now on would be too.
        """
        for index, block in enumerate(blocks):
            own = self._tags[block] == tag
            if not own and index < len(hashes) and block in self._published:
                own = self._published[block][0] == hashes[index]
            if not own or self._holding[block] is not Holding.ACTIVE:
                raise InternalError(f"KV block {block} does not hold what {tag[0]} has in it")

    def _evict(self) -> None:
        self._forget_oldest()
        self.num_evicted += 1

    def _forget_oldest(self) -> None:
        block, _ = self._idle.popitem(last=False)
        digest, _ = self._published.pop(block)
        del self._by_hash[digest]
        self._changes[digest] = False
        self._hold(block, Holding.FREE)
        self._free.append(block)

    def _sort_top(self, count: int) -> None:
        """Ascending numbers in one request let the KV link merge neighbours into one frame."""
        top = self._free[-count:]
        top.sort(reverse=True)
        self._free[-count:] = top

    def _hold(self, block: int, holding: Holding) -> None:
        self._counts[self._holding[block]] -= 1
        self._counts[holding] += 1
        self._holding[block] = holding

    def move(self, blocks: Sequence[int], source: Holding, target: Holding) -> None:
        """Change what one holder holds blocks for. Raises ValueError when one is not held as `source`."""
        freed = []
        for block in blocks:
            if block in self._shared:
                self._move_shared(block, source, target)
                continue
            if self._holding[block] is not source:
                raise ValueError(f"block {block} is {self._holding[block].name}, not {source.name}")
            if target is not Holding.FREE:
                self._hold(block, target)
            elif block in self._published:
                self._hold(block, Holding.CACHED)
                freed.append(block)
            else:
                self._hold(block, Holding.FREE)
                freed.append(block)
        for block in reversed(freed):  # the ends of prefixes are evicted before their beginnings
            if block in self._published:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _move_shared(self, block: int, source: Holding, target: Holding) -> None:
        holders = self._shared[block]
        at = (Holding.ACTIVE, Holding.STAGED)
        if source not in at or not holders[at.index(source)]:
            raise ValueError(f"block {block} is {self._holding[block].name}, not {source.name}")
        holders[at.index(source)] -= 1
        if target in at:
            holders[at.index(target)] += 1
        elif target is not Holding.FREE:
            raise ValueError(f"block {block} is shared and cannot be {target.name}")
        self._hold(block, Holding.ACTIVE if holders[0] else Holding.STAGED)
        if sum(holders) == 1:
            del self._shared[block]

    def free(self, blocks: Sequence[int], holding: Holding = Holding.ACTIVE) -> None:
        """Give blocks back."""
        if self._detained is not None and holding is Holding.ACTIVE:
            self._detained.extend(blocks)
            return
        self.move(blocks, holding, Holding.FREE)

    def detain(self) -> None:
        """From now on active blocks that are given back stay as they are, because a computation under way may write them."""
        self._detained = [] if self._detained is None else self._detained

    def let_go(self) -> None:
        """No computation is under way: what was detained is free."""
        detained, self._detained = self._detained, None
        if detained:
            self.move(detained, Holding.ACTIVE, Holding.FREE)

    # ---- the prefix cache ----

    def match(self, hashes: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Published blocks of the longest run of leading full blocks; nobody holds them by this, see `acquire`."""
        found: list[int] = []
        size = self.block_size
        for index, digest in enumerate(hashes):
            block = self._by_hash.get(digest)
            if block is None:
                break
            if self._published[block][1] != tuple(tokens[index * size : (index + 1) * size]):
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these are held by the cache alone; acquiring them leaves so many fewer to allocate."""
        return sum(1 for block in blocks if self._holding[block] is Holding.CACHED)

    def acquire(self, blocks: Sequence[int], holding: Holding = Holding.ACTIVE) -> None:
        """One more holder of published blocks."""
        for block in blocks:
            now = self._holding[block]
            if now is Holding.CACHED:
                del self._idle[block]
                self._hold(block, holding)
                continue
            if now not in (Holding.ACTIVE, Holding.STAGED) or block not in self._published:
                raise ValueError(f"block {block} is {now.name} and cannot be shared")
            holders = self._shared.setdefault(
                block, [int(now is Holding.ACTIVE), int(now is Holding.STAGED)]
            )
            holders[0 if holding is Holding.ACTIVE else 1] += 1
            self._hold(block, Holding.ACTIVE if holders[0] else Holding.STAGED)

    def share(self, blocks: Sequence[int]) -> None:
        """One more active holder of active blocks, published or not; who writes where is the holders' business."""
        for block in blocks:
            if self._holding[block] is not Holding.ACTIVE:
                raise ValueError(f"block {block} is {self._holding[block].name}, not ACTIVE")
            self._shared.setdefault(block, [1, 0])[0] += 1

    def is_sole(self, block: int) -> bool:
        """Whether its one holder may write it: nobody else holds it, and nobody can come to."""
        return block not in self._shared and block not in self._published

    def publish(self, block: int, digest: bytes, ids: Sequence[int]) -> None:
        """This block is full, computed, and never changes again. The first one with these tokens counts."""
        if digest not in self._by_hash and block not in self._published:
            self._by_hash[digest] = block
            self._published[block] = (digest, tuple(ids))
            self._changes[digest] = True

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes that can be found now and could not at the last call, and the other way round; a few may have been both."""
        changes, self._changes = self._changes, {}
        there = [digest for digest, is_there in changes.items() if is_there]
        return there, [digest for digest, is_there in changes.items() if not is_there]

    def flush(self) -> int:
        """Forget every cached block, none of those in use; returns how many became free."""
        count = len(self._idle)
        while self._idle:
            self._forget_oldest()
        return count

    def counts(self) -> dict[str, int]:
        """The ledger's line: total = free + active + cached + staged + quarantined."""
        free, active, staged, quarantined, cached = self._counts
        return {
            "total": self.num_blocks,
            "free": free,
            "active": active,
            "cached": cached,
            "staged": staged,
            "quarantined": quarantined,
        }
