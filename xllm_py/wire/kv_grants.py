"""The taker's table of grants: who may write which blocks, and what has been written. A machine without I/O or locks.

    GRANTED --first frame--> RECEIVING --complete COMMIT--> COMMITTED
    GRANTED, RECEIVING --refused COMMIT, contradiction--> FAILED
    any --revoke--> out of the table; late frames of the same peer are sunk and counted, never written

`in_flight` counts frames whose payload is being written; the blocks of a revoked grant are free only when it is 0. The
transport owns the table, holds one lock around every call, and shares it between all its links.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from xllm_py.base.hashing import same
from xllm_py.wire.codec import FrameLog

MAX_REMEMBERED = 4096  # revoked grants whose late frames are known as such


class GrantState(Enum):
    """Where a grant stands on the taker."""

    GRANTED = "granted"
    RECEIVING = "receiving"
    COMMITTED = "committed"
    FAILED = "failed"
    REVOKED = "revoked"


OPEN = frozenset({GrantState.GRANTED, GrantState.RECEIVING})


class Grant:
    """One grant as the taker sees it."""

    def __init__(
        self,
        *,
        grant: bytes,
        peer: str,
        block_size: int,
        block_ids: tuple[int, ...],
        first_wanted: int,
        prompt_digest: bytes,
    ) -> None:
        self.grant = grant
        self.peer = peer
        self.block_size = block_size  # tokens; what block_ids count in
        self.block_ids = block_ids
        self.first_wanted = first_wanted
        self.prompt_digest = prompt_digest
        self.state = GrantState.GRANTED
        self.frames = FrameLog()
        self.in_flight = 0

    @property
    def wanted(self) -> int:
        """Bit mask of the relative blocks that have to come."""
        return (1 << len(self.block_ids)) - (1 << self.first_wanted)


@dataclass(slots=True)
class _Revoked:
    """What is remembered of a grant that was taken back."""

    peer: str
    state: GrantState  # in which it was
    num_late: int = 0  # frames that came since


class GrantTable:
    """All grants of one taker."""

    def __init__(self) -> None:
        self._grants: dict[bytes, Grant] = {}
        self._revoked: OrderedDict[bytes, _Revoked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._grants)

    def open(self, grant: Grant) -> None:
        """Raises ValueError for a grant that is or was known: they are random, so that is our own mistake."""
        if grant.grant in self._grants or grant.grant in self._revoked:
            raise ValueError("a grant is opened once")
        self._grants[grant.grant] = grant

    def find(self, grant: bytes, peer: str) -> Grant | None:
        """The grant, if this peer may use it."""
        entry = self._grants.get(grant)
        if entry is None or not same(entry.peer.encode(), peer.encode()):
            return None
        return entry

    def state(self, grant: bytes, peer: str) -> GrantState | None:
        """Where a grant of this peer stands; one that was taken back after it had landed stays COMMITTED. None: it has none."""
        entry = self.find(grant, peer)
        if entry is not None:
            return entry.state
        revoked = self._revoked.get(grant)
        if revoked is None or not same(revoked.peer.encode(), peer.encode()):
            return None
        landed = revoked.state is GrantState.COMMITTED
        return GrantState.COMMITTED if landed else GrantState.REVOKED

    def is_late(self, grant: bytes, peer: str) -> bool:
        """Whether a frame of this peer may still be on its way although the grant was revoked before its COMMIT."""
        revoked = self._revoked.get(grant)
        return (
            revoked is not None
            and same(revoked.peer.encode(), peer.encode())
            and revoked.state is not GrantState.COMMITTED
        )

    def count_late(self, grant: bytes) -> int:
        """One more frame of a grant that `is_late`; returns how many there were."""
        revoked = self._revoked[grant]
        revoked.num_late += 1
        return revoked.num_late

    def revoke(self, grant: bytes) -> bool:
        """Take it out of the table. True: nothing of it is being written, its blocks are free now."""
        entry = self._grants.pop(grant, None)
        if entry is None:
            return True
        self._revoked[grant] = _Revoked(entry.peer, entry.state)
        while len(self._revoked) > MAX_REMEMBERED:
            self._revoked.popitem(last=False)
        entry.state = GrantState.REVOKED
        return entry.in_flight == 0

    def is_open(self, grant: bytes) -> bool:
        """Whether its blocks may still come."""
        entry = self._grants.get(grant)
        return entry is not None and entry.state in OPEN

    def fail(self, grant: bytes) -> bool:
        """Its blocks will not come; False when it is not open."""
        if not self.is_open(grant):
            return False
        self._grants[grant].state = GrantState.FAILED
        return True

    def receiving(self, peer: str) -> list[Grant]:
        """Grants of one peer of which some frame has come, but no COMMIT."""
        return [
            entry
            for entry in self._grants.values()
            if entry.state is GrantState.RECEIVING and entry.peer == peer
        ]
