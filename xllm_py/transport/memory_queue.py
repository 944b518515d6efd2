"""What one link in memory has to send, each item with the moment when it is due. Used by transport/memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from xllm_py.transport.base import GiverGrant
from xllm_py.wire.codec import FrameLog

# due, grant, layer, first, blocks (none: COMMIT, or with layer -1 a probe of `first` bytes)
Item = tuple[float, bytes, int, int, tuple[int, ...]]


@dataclass(slots=True)
class Sent:
    """One grant as the giver sees it."""

    grant: GiverGrant
    since_s: float
    wanted: bool = True  # may be sent: it is pushed, or the taker has asked for it
    held: list[Item] = field(default_factory=list)  # while it is not
    ready_s: float | None = None  # when COMMIT was asked for
    committed_s: float | None = None
    frames: FrameLog = field(default_factory=FrameLog)


class Sending:
    """All grants of one link."""

    def __init__(self) -> None:
        self.givings: dict[bytes, Sent] = {}
        self._queue: deque[Item] = deque()

    def put(self, item: Item) -> None:
        """Queue it, or keep it until the taker asks for it."""
        giving = self.givings[item[1]]
        (self._queue if giving.wanted else giving.held).append(item)

    def fetch(self, read_grant: bytes) -> None:
        """The taker asks."""
        for giving in self.givings.values():
            if giving.grant.read_grant == read_grant:
                giving.wanted = True
                self._queue.extend(giving.held)
                giving.held.clear()

    @property
    def due(self) -> float | None:
        """When the next item is; None: there is none."""
        return self._queue[0][0] if self._queue else None

    def next(self, now: float) -> tuple[Sent, Item] | None:
        """What is due."""
        if not self._queue or self._queue[0][0] > now:
            return None
        item = self._queue.popleft()
        return self.givings[item[1]], item

    def is_overdue(self, since: float) -> bool:
        """Whether a COMMIT or probe was sent before `since` and is not answered."""
        sent = (each.committed_s for each in self.givings.values())
        return any(moment is not None and moment < since for moment in sent)

    def drop(self, grant: bytes) -> None:
        """Send nothing more of it."""
        self.givings.pop(grant, None)
        self._queue = deque(item for item in self._queue if item[1] != grant)
