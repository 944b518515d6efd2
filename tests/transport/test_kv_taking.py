"""A revoked grant is released when the last frame has left its blocks, whichever link carries it."""

from __future__ import annotations

from tests.conformance.kv_pair import DIGEST, make_memory
from xllm_py.transport.base import KvEventKind, TakerGrant
from xllm_py.transport.kv_events import Counts, EventQueue
from xllm_py.transport.kv_taking import Taking

GRANT = b"g" * 16


def test_two_frames_in_flight_have_both_to_leave() -> None:
    events = EventQueue()
    taking = Taking(memory=make_memory(None), events=events, counts=Counts())
    taking.open(
        TakerGrant(
            grant=GRANT,
            peer_incarnation="p",
            block_size=4,
            block_ids=(1, 2),
            first_wanted=0,
            prompt_digest=DIGEST,
        )
    )
    entry = taking.grants.find(GRANT, "p")
    assert entry is not None
    entry.in_flight = 2
    taking.revoke(GRANT)
    entry.in_flight = 1
    taking.settle(entry)
    assert events.take() == []
    entry.in_flight = 0
    taking.settle(entry)
    assert [event.kind for event in events.take()] == [KvEventKind.RELEASED]
    events.wake.close()
