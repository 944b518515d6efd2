"""What one link has to send, and what it has sent that is not acknowledged yet: P's half of a KV link as a plain machine.

    add -> push ... commit -> next ... next -> acknowledged
                                 '--the link broke: reopened--> next ... (again, or RESUME when COMMIT had left)

What a peer fetches (PULL) waits until it has asked for it on the link that is open.

Whatever was sent over a link that broke may not have come, so it is sent again over the next one with the frame boundaries it
had; a taker passes over what it has. Has COMMIT left, the taker is asked first, since a grant that has landed takes no frames. No
lock, no clock, no socket: the link (transport/tcp_giver) owns one and guards it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from xllm_py.base.hashing import payload_checksum, same
from xllm_py.core.kv_memory import PARTS
from xllm_py.transport.base import GiverGrant
from xllm_py.wire.codec import FrameLog, FrameType
from xllm_py.wire.kv_session import GiverSession

_QUESTIONS = (FrameType.RESUME, FrameType.PROBE)
MAX_TRIES = 4  # links that a grant may see break
MAX_PROBES = 16  # that a peer fetches at a time
MAX_EARLY = 1024  # read grants of a link that were asked for and are not known yet


class Item(NamedTuple):
    """One frame to come: blocks of one layer and part, COMMIT, RESUME, or PROBE; `first` of a probe that is fetched is its size."""

    kind: FrameType
    grant: bytes
    layer: int = 0
    part: int = 0
    first: int = 0
    block_ids: tuple[int, ...] = ()


def frames_of(
    grant: bytes, layer: int, first: int, block_ids: tuple[int, ...], most: int
) -> Iterator[Item]:
    """K and V of these blocks of one layer, at most so many blocks a frame."""
    for part in range(PARTS):
        for start in range(0, len(block_ids), most):
            blocks = block_ids[start : start + most]
            yield Item(FrameType.DATA, grant, layer, part, first + start, blocks)


@dataclass(slots=True)
class Giving:
    """One grant as this side sees it."""

    grant: GiverGrant
    probe_bytes: int = 0  # of a probe, which has no blocks and no COMMIT
    frames: FrameLog = field(default_factory=FrameLog)
    sent: list[Item] = field(default_factory=list)  # over the link that is open, in order
    wanted: bool = True  # may be sent: it is pushed, or the peer has asked for it
    held: list[Item] = field(default_factory=list)  # while it is not
    broken: int = 0  # links that broke under it
    started_s: float = 0.0
    ready_s: float = 0.0  # when COMMIT was asked for: from here on nothing hides the transfer
    committed_s: float = 0.0  # when COMMIT or RESUME was sent last; 0: no answer is awaited

    def question(self, session: GiverSession, kind: FrameType) -> bytes:
        """A frame that the taker answers: COMMIT, RESUME or PROBE."""
        name = self.grant.grant
        if kind is FrameType.RESUME:
            return session.resume(name)
        if kind is FrameType.PROBE:
            payload = bytes(self.probe_bytes)
            return session.probe(name, len(payload), payload_checksum(payload)) + payload
        payload = self.frames.commit_payload(self.grant.prompt_digest)
        return session.commit(name, payload, payload_checksum(payload)) + payload


class Givings:
    """All grants of one link."""

    def __init__(self) -> None:
        self._givings: dict[bytes, Giving] = {}
        self._queue: deque[Item] = deque()
        self._early: OrderedDict[bytes, None] = OrderedDict()  # see MAX_EARLY

    def __len__(self) -> int:
        return len(self._givings)

    def __contains__(self, grant: bytes) -> bool:
        return grant in self._givings

    def __iter__(self) -> Iterator[Giving]:
        return iter(self._givings.values())

    def get(self, grant: bytes) -> Giving | None:
        """The grant, while it is open."""
        return self._givings.get(grant)

    def add(self, grant: GiverGrant, probe_bytes: int = 0) -> None:
        """Serve it; a probe's only frame is queued at once."""
        giving = self._givings[grant.grant] = Giving(grant, probe_bytes)
        giving.wanted = not grant.read_grant or grant.read_grant in self._early
        self._early.pop(grant.read_grant, None)
        if probe_bytes:
            self._queue.append(Item(FrameType.PROBE, grant.grant))

    def put(self, items: Iterable[Item], now: float) -> None:
        """Queue frames; those of a grant that has ended are passed over."""
        for item in items:
            giving = self._givings.get(item.grant)
            if giving is not None:
                self._put(giving, [item])
                if item.kind is FrameType.COMMIT:
                    giving.ready_s = giving.ready_s or now

    def _put(self, giving: Giving, items: Iterable[Item]) -> None:
        (self._queue if giving.wanted else giving.held).extend(items)

    def fetch(self, read_grant: bytes) -> None:
        """The peer asks for what this grant of ours is about, perhaps before we have its own."""
        for giving in self._givings.values():
            if same(giving.grant.read_grant, read_grant):
                giving.wanted = True
                held, giving.held = giving.held, []
                self._queue.extend(held)
                return
        self._early[read_grant] = None
        if len(self._early) > MAX_EARLY:
            self._early.popitem(last=False)

    def fetch_probe(self, name: bytes, num_bytes: int) -> bool:
        """The peer asks for a probe, which is over with this link. False: too many wait to be sent."""
        if sum(item.kind is FrameType.PROBE for item in self._queue) >= MAX_PROBES:
            return False
        self._queue.append(Item(FrameType.PROBE, name, first=num_bytes))
        return True

    def next(self) -> tuple[Giving, Item] | None:
        """The frame that is to be sent now; it counts as sent."""
        if not self._queue:
            return None
        item = self._queue.popleft()
        giving = self._givings.get(item.grant) or _fetched_probe(item)
        if item.kind is FrameType.DATA:
            giving.sent.append(item)
        return giving, item

    def drop(self, grant: bytes) -> Giving | None:
        """Forget a grant."""
        giving = self._givings.pop(grant, None)
        if giving is not None:
            self._queue = deque(item for item in self._queue if item.grant != grant)
        return giving

    def reopened(self) -> list[bytes]:
        """The link broke and another one will be there. Returns the grants, forgotten now, that have seen too many break."""
        for giving in self._givings.values():
            giving.broken += 1
            giving.wanted = not giving.grant.read_grant
        hopeless = [name for name, each in self._givings.items() if each.broken >= MAX_TRIES]
        for grant in hopeless:
            self.drop(grant)
        rest = [item for item in self._queue if item.kind not in _QUESTIONS]
        self._queue.clear()
        self._early.clear()
        for giving in self._givings.values():
            if giving.probe_bytes:
                self._queue.append(Item(FrameType.PROBE, giving.grant.grant))
            elif giving.committed_s:
                self._queue.append(Item(FrameType.RESUME, giving.grant.grant))
            else:
                items, giving.sent = giving.sent, []
                self._put(giving, items)
        for item in rest:
            self._put(self._givings[item.grant], [item])
        return hopeless

    def again(self, grant: bytes) -> None:
        """The taker says that it has not landed: all its frames and COMMIT once more."""
        giving = self._givings.get(grant)
        if giving is None or not giving.committed_s:
            return
        items, giving.sent, giving.committed_s = giving.sent, [], 0.0
        self._put(giving, [*items, Item(FrameType.COMMIT, grant)])

    def clear(self) -> list[bytes]:
        """Forget everything; returns the grants that were open."""
        grants = list(self._givings)
        self._givings.clear()
        self._queue.clear()
        return grants


def _fetched_probe(item: Item) -> Giving:
    """It lives as long as its frame; nobody here waits for its answer."""
    name = GiverGrant(
        grant=item.grant, endpoints=(), peer_incarnation="", block_size=0, prompt_digest=b""
    )
    return Giving(name, probe_bytes=item.first)
