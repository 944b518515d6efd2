"""A KvTransport over a cache that the host cannot reach: blocks are copied out before they are pushed, and in when they have landed.

Implements base.KvTransport around another one, whose bytes are the cache's mirror (core.kv_memory.Mirror). Copies are made by the engine's
thread, which owns the device: in mid-step, layer by layer, on the way out; between two steps on the way in. Out, they are one push behind: what a
layer left is waited for and pushed when the copy of the next has begun, so that the device has that one to compute meanwhile; the last layer's at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from xllm_py.core.kv_memory import KvMemory, Mirror
from xllm_py.transport.base import (
    GiverGrant,
    KvEvent,
    KvEventKind,
    KvTransport,
    TakerGrant,
)

_Asked = tuple[bytes, int, int, tuple[int, ...]]  # of `push`


class MirroredTransport:
    """Implements KvTransport."""

    def __init__(self, inner: KvTransport, memory: KvMemory, mirror: Mirror) -> None:
        self._inner = inner
        self._mirror = mirror
        self._block_size = memory.layout.block_size
        self._last_layer = memory.layout.num_layers - 1
        self._begun: tuple[Callable[[], None], _Asked] | None = (
            None  # a copy, and what is pushed then
        )
        self._pieces: dict[bytes, int] = {}  # given: how many granted blocks make one of ours
        self._wanted: dict[bytes, list[int]] = {}  # taken: our blocks that will be written
        self.revoke = self._inner.revoke
        self.probe = self._inner.probe
        self.ledger = self._inner.ledger
        self.close = self._inner.close

    @property
    def endpoint(self) -> str:
        """See KvTransport."""
        return self._inner.endpoint

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._inner.wake_fd

    def open_grant(self, grant: TakerGrant) -> int:
        """See KvTransport."""
        self._push_begun()  # else a copy that a broken step left would land on what is written here
        stream = self._inner.open_grant(grant)
        pieces = self._block_size // grant.block_size
        self._wanted[grant.grant] = _whole(grant.block_ids[grant.first_wanted :], pieces)
        return stream

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        self._pieces[grant.grant] = self._block_size // grant.block_size
        self._inner.connect(grant)

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """See KvTransport."""
        pieces = self._pieces.get(grant)
        if pieces is None or not block_ids:
            self._inner.push(grant, layer, first_relative, block_ids)
            return
        finish = self._mirror.take_out(layer, _whole(block_ids, pieces))
        self._push_begun()
        self._begun = finish, (grant, layer, first_relative, block_ids)
        if layer == self._last_layer:
            self._push_begun()

    def _push_begun(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            finish, asked = begun
            finish()
            self._inner.push(*asked)

    def commit(self, grant: bytes) -> None:
        """See KvTransport."""
        self._push_begun()
        self._inner.commit(grant)

    def abandon(self, grant: bytes) -> None:
        """See KvTransport."""
        self._push_begun()
        self._pieces.pop(grant, None)
        self._inner.abandon(grant)

    def poll(self) -> list[KvEvent]:
        """See KvTransport."""
        self._push_begun()
        events = self._inner.poll()
        for event in events:
            blocks = None
            if event.kind in (KvEventKind.LANDED, KvEventKind.RELEASED):
                blocks = self._wanted.pop(event.grant, None)
            elif event.kind in (KvEventKind.ACKNOWLEDGED, KvEventKind.FAILED):
                self._pieces.pop(event.grant, None)
            if blocks and event.kind is KvEventKind.LANDED:
                self._mirror.put_in(blocks)
        return events


def over(transport: KvTransport, memory: KvMemory) -> KvTransport:
    """The transport as the engine uses it: with copies, where the memory is a mirror."""
    mirror = memory.mirror
    return transport if mirror is None else MirroredTransport(transport, memory, mirror)


def _whole(block_ids: Iterable[int], pieces: int) -> list[int]:
    """Our blocks that these granted ones are parts of."""
    return sorted({block // pieces for block in block_ids})
