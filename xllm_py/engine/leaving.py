"""P: what leaves with the layers of the step that runs. Part of engine/giving.

Blocks that a step completes are pushed as its layers are stored, so that a transfer is hidden behind the prefill. Layers that hold little
leave together: each push wakes the link's thread, which may have no core of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from xllm_py.base.errors import LayoutMismatch
from xllm_py.core.kv_memory import PARTS, KvLayout
from xllm_py.transport.base import KvTransport

PUSH_BYTES = 512 << 10  # of all layers that leave together


class Leaving:
    """Claims of one step: blocks of a grant, complete when the step is."""

    def __init__(self, layout: KvLayout, transport: KvTransport | None) -> None:
        self._layout = layout
        self._transport = transport
        self._claims: list[tuple[bytes, int, tuple[int, ...]]] = []
        self._bytes_a_layer = 0
        self._num_stored = self._num_pushed = 0  # layers

    def begin(self) -> None:
        """Of a step; what an earlier one claimed is forgotten."""
        self._claims.clear()
        self._bytes_a_layer = self._num_stored = self._num_pushed = 0

    def claim(self, grant: bytes, first: int, block_ids: tuple[int, ...], block_size: int) -> None:
        """These blocks leave with the step, those layers that have left for others already now."""
        self._claims.append((grant, first, block_ids))
        self._bytes_a_layer += len(block_ids) * self._layout.at(block_size).block_bytes * PARTS
        for layer in range(self._num_pushed):
            self.transport.push(grant, layer, first, block_ids)

    def stored(self, layer: int) -> None:
        """This layer is complete for every claimed block."""
        self._num_stored = layer + 1
        waiting = (self._num_stored - self._num_pushed) * self._bytes_a_layer
        if waiting < PUSH_BYTES and self._claims and self._num_stored < self._layout.num_layers:
            return
        for each in range(self._num_pushed, self._num_stored):
            for grant, first, block_ids in self._claims:
                self.transport.push(grant, each, first, block_ids)
        self._num_pushed = self._num_stored

    def claimed(self) -> Iterator[tuple[bytes, int]]:
        """Grant and first block of each claim."""
        return ((grant, first) for grant, first, _ in self._claims)

    @property
    def transport(self) -> KvTransport:
        """Raises LayoutMismatch where there is none: then nothing can have been granted."""
        if self._transport is None:
            raise LayoutMismatch("a handoff on an engine without KV transport")
        return self._transport
