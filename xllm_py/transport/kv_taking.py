"""The taker's grants behind one lock, and what is told of them. Shared by all links of one taker; knows no socket.

`open` and `revoke` are the engine thread's, the rest is the links'.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from xllm_py.core.kv_memory import KvMemory
from xllm_py.transport.base import KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.kv_events import Counts, EventQueue
from xllm_py.wire import kv_session
from xllm_py.wire.kv_grants import Grant, GrantState, GrantTable

TELL_S = 1.0  # how often it is told that blocks keep coming


@dataclass(slots=True)
class _Arrival:
    """Of one grant."""

    started_s: float
    told_s: float


class Taking:
    """The grant table with its lock, and what happens to grants, for all links of one taker."""

    def __init__(self, *, memory: KvMemory, events: EventQueue, counts: Counts) -> None:
        self.memory = memory
        self.events = events
        self.counts = counts
        self.lock = threading.Lock()
        self.grants = GrantTable()
        self._arrivals: dict[bytes, _Arrival] = {}

    def open(self, grant: TakerGrant) -> None:
        """Engine thread: the peer may write from now on."""
        self.memory.at(grant.block_size).check(
            0, grant.block_ids
        )  # raises IndexError here and not in a link's thread
        with self.lock:
            self.grants.open(
                Grant(
                    grant=grant.grant,
                    peer=grant.peer.name,
                    block_size=grant.block_size,
                    block_ids=grant.block_ids,
                    first_wanted=grant.first_wanted,
                    prompt_digest=grant.prompt_digest,
                )
            )

    def revoke(self, grant: bytes) -> None:
        """Engine thread: RELEASED follows, now or when the frame in flight has left the blocks."""
        with self.lock:
            self._arrivals.pop(grant, None)
            if self.grants.revoke(grant):
                self.events.put(KvEvent(kind=KvEventKind.RELEASED, grant=grant))

    def arriving(self, grant: Grant, now: float) -> None:
        """Lock held. New blocks of a grant begin to come."""
        if grant.state is not GrantState.RECEIVING:
            return  # it ended since their header was judged
        arrival = self._arrivals.get(grant.grant)
        if arrival is None:
            self._arrivals[grant.grant] = _Arrival(now, now)
        elif now - arrival.told_s < TELL_S:
            return
        else:
            arrival.told_s = now
        self.events.put(KvEvent(kind=KvEventKind.RECEIVING, grant=grant.grant))

    def settle(self, grant: Grant | None) -> None:
        """Lock held, after a frame has left its blocks."""
        if grant is not None and grant.state is GrantState.REVOKED and grant.in_flight == 0:
            self.events.put(KvEvent(kind=KvEventKind.RELEASED, grant=grant.grant))

    def landed(self, landed: kv_session.Landed, now: float) -> None:
        """Lock held. COMMIT verified."""
        arrival = self._arrivals.pop(landed.grant, None)
        seconds = now - arrival.started_s if arrival is not None else 0.0
        self.events.put(
            KvEvent(
                kind=KvEventKind.LANDED,
                grant=landed.grant,
                num_bytes=landed.num_bytes,
                seconds=seconds,
            )
        )

    def failed(self, grant: bytes, text: str) -> None:
        """Lock held. Nothing can land under this grant any more."""
        self._arrivals.pop(grant, None)
        self.events.put(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=text))

    def num_open(self, grants: Iterable[bytes]) -> int:
        """How many of them wait for blocks."""
        with self.lock:
            return sum(self.grants.is_open(grant) for grant in grants)

    def not_landed(self, grants: Iterable[bytes], peer: str) -> list[bytes]:
        """Those of them that this peer was given and has not filled, be they open or taken back."""
        ended = (None, GrantState.COMMITTED, GrantState.FAILED)
        with self.lock:
            return [grant for grant in grants if self.grants.state(grant, peer) not in ended]

    def probed(self, name: bytes, num_bytes: int, seconds: float) -> None:
        """A probe that we fetched has come."""
        self.events.put(
            KvEvent(kind=KvEventKind.ACKNOWLEDGED, grant=name, num_bytes=num_bytes, seconds=seconds)
        )

    def fetching_failed(self, grants: Iterable[bytes], probes: Iterable[bytes], text: str) -> None:
        """What we ask a giver for will not come."""
        self.counts.add("failures")
        with self.lock:
            for grant in grants:
                if self.grants.fail(grant):
                    self.failed(grant, text)
        for name in probes:
            self.events.put(KvEvent(kind=KvEventKind.FAILED, grant=name, text=text))

    def link_lost(self, peer: str, text: str) -> None:
        """The last link of this peer broke: what it had begun will not be finished."""
        with self.lock:
            for grant in self.grants.receiving(peer):
                grant.state = GrantState.FAILED
                self.failed(grant.grant, text)
