"""The KV cache as bytes: what a KV link reads and writes, whatever computes with it.

    regions[layer * 2 + part]  one flat, writable byte view per layer and part (0 = K, 1 = V)
                               block b occupies [b * block_bytes, (b + 1) * block_bytes)

Owned by the executor; lent to the transport for the life of the engine. Never copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from xllm_py.base.hashing import fingerprint

PARTS = 2
POISON = b"\x7f"  # repeated: finite in every dtype, so that nothing times it is nothing, and far from any key or value
CARRIED_BYTES = 1024
_MAX_REMEMBERED = 64  # block lists: every layer and part of a push asks for the same blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Two instances can exchange KV when the fingerprints of their layouts are equal.

    A token's K (or V) of one layer lies in one piece, a block's tokens one after the other, so a block is also so many smaller ones.
    """

    num_layers: int
    block_size: int  # tokens
    block_bytes: int  # of one block of one layer and part
    shape: str  # of a head, for people and for the fingerprint: "head_dim=64 dtype=bfloat16"
    num_heads: int = 1  # KV heads in these bytes: those of the model, or of one rank, or that go from one rank to another

    @property
    def text(self) -> str:
        """For people."""
        return f"layers={self.num_layers} kv_heads={self.num_heads} {self.shape}"

    @property
    def fingerprint(self) -> str:
        """Hex name of what a token's KV looks like; size and number of blocks are not part of it."""
        return fingerprint(self.text, str(self.block_bytes // self.block_size))

    def heads(self, count: int) -> KvLayout:
        """With another number of heads."""
        head_bytes = self.block_bytes // self.num_heads
        return replace(self, num_heads=count, block_bytes=head_bytes * count)

    def at(self, block_size: int) -> KvLayout:
        """The same memory in smaller blocks. Raises ValueError when ours are no multiple of them."""
        if block_size < 1 or self.block_size % block_size:
            raise ValueError(f"blocks of {self.block_size} tokens are not made of {block_size}")
        pieces = self.block_size // block_size
        return replace(self, block_size=block_size, block_bytes=self.block_bytes // pieces)


class Mirror(Protocol):
    """Copies between a cache that the host cannot reach and the host's bytes of it; whole blocks, by their numbers."""

    def take_out(self, layer: int, block_ids: Sequence[int]) -> Callable[[], None]:
        """Begin to copy both parts of one layer from the device; when what is returned has returned, the bytes are there."""
        ...

    def put_in(self, block_ids: Sequence[int]) -> None:
        """To the device, all layers and parts."""
        ...


class Carrier(Protocol):
    """Copies blocks between a region and one piece of memory where they lie one after the other, and returns the content's
    `hashing.payload_checksum`, computed from what was read once. Blocks are at least one, of a multiple of CARRIED_BYTES, their numbers
    64-bit integers and believed. Without the interpreter's lock.
    """

    def gather(self, region: memoryview, blocks: memoryview, flat: memoryview) -> int:
        """Out of the region."""
        ...

    def scatter(self, region: memoryview, blocks: memoryview, flat: memoryview) -> int:
        """Into the region."""
        ...


class KvMemory:
    """Byte views over all blocks. mirror: the cache itself is elsewhere, and these bytes are a copy that is as new as it was asked to be.

    carrier: where the device has one.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        regions: Sequence[memoryview],
        mirror: Mirror | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        if len(regions) != layout.num_layers * PARTS:
            raise ValueError(f"{len(regions)} regions for {layout.num_layers} layers")
        for region in regions:
            if region.nbytes != num_blocks * layout.block_bytes or region.readonly:
                raise ValueError("a region must be writable and hold every block")
        self.layout = layout
        self.num_blocks = num_blocks
        self.mirror = mirror
        self._carrier = carrier
        self._regions = [region.cast("B") for region in regions]
        self.token = slice(None)  # bytes of each token that are meant (see `heads`)
        self._finer: dict[int, KvMemory] = {layout.block_size: self}
        self._cut: dict[tuple[int, int], KvMemory] = {}
        self._places = lru_cache(maxsize=_MAX_REMEMBERED)(self._locate)

    def at(self, block_size: int) -> KvMemory:
        """The same bytes in smaller blocks: block b is theirs b * n to b * n + n - 1. Raises ValueError as KvLayout.at does."""
        found = self._finer.get(block_size)
        if found is None:
            layout = self.layout.at(block_size)
            num_blocks = self.num_blocks * self.layout.block_size // block_size
            found = self._finer[block_size] = KvMemory(
                layout, num_blocks, self._regions, carrier=self._carrier
            )
        return found

    def heads(self, first: int, count: int) -> KvMemory:
        """Of each token only these heads. Where that is not all of them they do not lie together: `span` and `spans` are not for such a
        memory, and transport/stage copies. Raises ValueError when they are not all there.
        """
        total = self.layout.num_heads
        if not (first >= 0 and count >= 1 and first + count <= total):
            raise ValueError(f"heads {first}+{count} of {total}")
        if count == total:
            return self
        found = self._cut.get((first, count))
        if found is None:
            found = KvMemory(self.layout, self.num_blocks, self._regions, self.mirror)
            self._cut[first, count] = found
            found.layout = self.layout.heads(count)
            head_bytes = self.layout.block_bytes // self.layout.block_size // total
            found.token = slice(first * head_bytes, (first + count) * head_bytes)
        return found

    @property
    def carrier(self) -> Carrier | None:
        """The device's, when it can carry blocks of this size."""
        return self._carrier if self.layout.block_bytes % CARRIED_BYTES == 0 else None

    @property
    def is_cut(self) -> bool:
        """Whether it has only some heads of each token."""
        return self.token != slice(None)

    def span(self, layer: int, part: int, first_block: int, count: int = 1) -> memoryview:
        """Bytes of `count` adjacent blocks. Raises IndexError when they are not all in the cache."""
        if not (first_block >= 0 and count >= 1 and first_block + count <= self.num_blocks):
            raise IndexError(f"blocks {first_block}+{count} of {self.num_blocks}")
        size = self.layout.block_bytes
        return self.region(layer, part)[first_block * size : (first_block + count) * size]

    def spans(self, layer: int, part: int, block_ids: tuple[int, ...]) -> list[memoryview]:
        """Bytes of these blocks in their order, adjacent ones in one view. Raises IndexError as `span` does."""
        region = self.region(layer, part)
        return [region[place] for place in self._places(block_ids)]

    def num_pieces(self, block_ids: tuple[int, ...]) -> int:
        """How many views `spans` gives. Raises IndexError as it does."""
        return len(self._places(block_ids))

    def check(self, layer: int, block_ids: tuple[int, ...]) -> None:
        """Raises IndexError where `spans` would."""
        self.region(layer, 0)
        self._places(block_ids)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill these blocks with nonsense: whoever reads what nobody wrote shows it."""
        for layer in range(self.layout.num_layers):
            for part in range(PARTS):
                for view in self.spans(layer, part, tuple(block_ids)):
                    view[:] = POISON * view.nbytes
        if self.mirror is not None:
            self.mirror.put_in(block_ids)

    def region(self, layer: int, part: int) -> memoryview:
        """All blocks, with every head. Raises IndexError."""
        if not (0 <= layer < self.layout.num_layers and 0 <= part < PARTS):
            raise IndexError(f"layer {layer}, part {part}")
        return self._regions[layer * PARTS + part]

    def _locate(self, block_ids: tuple[int, ...]) -> list[slice]:
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self.num_blocks):
            raise IndexError(f"blocks {min(block_ids)}..{max(block_ids)} of {self.num_blocks}")
        size = self.layout.block_bytes
        return [slice(first * size, end * size) for first, end in _runs(block_ids)]


def _runs(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of each run of adjacent blocks."""
    runs: list[tuple[int, int]] = []
    first = end = -1
    for block in block_ids:
        if block != end:
            if end >= 0:
                runs.append((first, end))
            first = block
        end = block + 1
    if end >= 0:
        runs.append((first, end))
    return runs


def in_pieces(block_ids: Sequence[int], pieces: int) -> tuple[int, ...]:
    """The numbers that `pieces` times smaller blocks of these blocks have, in their order (KvMemory.at)."""
    return tuple(block * pieces + piece for block in block_ids for piece in range(pieces))
