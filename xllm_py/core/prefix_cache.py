"""Which leading blocks of a request are there already, and which of its own others may share: hashes over core/block_manager.

Used by the batch (admission), the reservations (offers) and the scheduler (publishing). Without a root there is no prefix cache:
nothing is found and nothing is published.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_py.base.hashing import block_hashes, next_hash, salted
from xllm_py.core.block_manager import BlockManager
from xllm_py.core.request import Request, State

# names of `PrefixCache.counts`; each only grows
COUNTS = (
    "prefix_queried_tokens",
    "prefix_hit_tokens",
    "prefix_queried_blocks",
    "prefix_hit_blocks",
    "prefix_evicted_blocks",
)
_NEVER = 1 << 62  # tokens: nothing of this request is ever shared


class PrefixCache:
    """One engine's. The counters are in tokens."""

    def __init__(self, blocks: BlockManager, root: bytes) -> None:
        """root: the parent of every first block's hash (model, seed, key); empty: no prefix cache."""
        self._blocks = blocks
        self._root = root
        self._computing: dict[bytes, Request] = {}  # blocks of prompts that somebody computes now
        self.num_queried = 0
        self.num_hit = 0
        self._num_blocks_queried = 0  # full ones

    @property
    def enabled(self) -> bool:
        """Whether there is a prefix cache."""
        return bool(self._root)

    def find(self, request: Request, num_tokens: int) -> list[int]:
        """Blocks with the request's leading `num_tokens` tokens, full blocks only; the caller acquires them."""
        if not self._root:
            return []
        size = self._blocks.block_size
        count = num_tokens // size
        self._extend(request, count)
        return self._blocks.match(request.hashes[:count], request.tokens)

    def find_ids(self, ids: Sequence[int], salt: str) -> list[int]:
        """As `find`, for tokens that are no request yet."""
        if not self._root:
            return []
        hashes = block_hashes(salted(self._root, salt), ids, self._blocks.block_size)
        return self._blocks.match(hashes, ids)

    def worth_waiting(self, request: Request, num_found: int, num_tokens: int) -> bool:
        """Whether the block behind those found is being computed for somebody else right now: soon it can be shared."""
        if not self._root or num_found >= num_tokens // self._blocks.block_size:
            return False
        return request.hashes[num_found] in self._computing

    def leave(self, request: Request) -> None:
        """It ended or lost its blocks: nobody is to wait for what it was computing."""
        for digest in request.hashes:
            if self._computing.get(digest) is request:
                del self._computing[digest]

    def note(self, queried: int, hit: int) -> None:
        """Count an admission: tokens that were looked for and tokens that were there."""
        if self._root:
            self.num_queried += queried
            self.num_hit += hit
            self._num_blocks_queried += queried // self._blocks.block_size

    def publish(self, request: Request) -> None:
        """Let others share every full block of the request that is computed."""
        if not self._root:
            request.publish_at = _NEVER
            return
        size = self._blocks.block_size
        count = request.num_computed // size
        self._extend(request, count)
        first = request.publish_at // size - 1
        for index in range(first, count):
            ids = request.tokens[index * size : (index + 1) * size]
            self._blocks.publish(request.block_ids[index], request.hashes[index], ids)
            if self._computing.get(request.hashes[index]) is request:
                del self._computing[request.hashes[index]]
        request.publish_at = (count + 1) * size

    def begin(self, request: Request, num_found: int) -> None:
        """The request holds its blocks; so many leading ones are published already."""
        if not self._root:
            request.publish_at = _NEVER
            return
        request.publish_at = (num_found + 1) * self._blocks.block_size
        if request.state is State.WAITING:  # it is about to compute the rest of them
            for digest in request.hashes[num_found:]:
                self._computing.setdefault(digest, request)

    def counts(self) -> dict[str, int]:
        """For the ledger: since the start."""
        size = self._blocks.block_size
        values = (
            self.num_queried,
            self.num_hit,
            self._num_blocks_queried,
            self.num_hit // size,  # a hit is whole blocks
            self._blocks.num_evicted,
        )
        return dict(zip(COUNTS, values, strict=True))

    def _extend(self, request: Request, count: int) -> None:
        """Hash the first `count` blocks, each once in a request's life: its tokens never change."""
        size, hashes = self._blocks.block_size, request.hashes
        while len(hashes) < count:
            at = len(hashes) * size
            parent = hashes[-1] if hashes else salted(self._root, request.submission.cache_salt)
            hashes.append(next_hash(parent, request.tokens[at : at + size]))
