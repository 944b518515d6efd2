"""The in-memory transport's faults: whatever happens to the bytes, nothing damaged lands and both sides hear of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.kv_pair import KEY, LAYOUT, Pair
from xllm_py.base.clock import HandClock
from xllm_py.core.kv_memory import PARTS, KvMemory
from xllm_py.transport.base import KvEventKind, KvTransport
from xllm_py.transport.memory import Faults, MemoryKvTransport, MemoryNetwork
from xllm_py.wire.codec import COMMIT_BYTES, HEADER_BYTES

BLOCKS = 2
FRAME_BYTES = HEADER_BYTES + BLOCKS * LAYOUT.block_bytes
NUM_FRAMES = LAYOUT.num_layers * PARTS
WIRE_BYTES = NUM_FRAMES * FRAME_BYTES + HEADER_BYTES + COMMIT_BYTES


class Rig:
    """A pair over a network whose faults a test sets."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.faults = Faults()
        network = MemoryNetwork(self.clock, lambda _giver, _taker: self.faults)

        def make(*, memory: KvMemory, incarnation: str, cluster_key: bytes = KEY) -> KvTransport:
            return MemoryKvTransport(
                network=network, memory=memory, incarnation=incarnation, cluster_key=cluster_key
            )

        self.pair = Pair(make)

    def give(self) -> bytes:
        grant = self.pair.grant((10, 20))
        self.pair.give(grant, (1, 2))
        for _ in range(3):
            self.pair.turn()
        return grant

    def kinds(self, grant: bytes) -> tuple[set[KvEventKind], set[KvEventKind]]:
        """What P heard and what D heard of the end."""
        pair = self.pair
        return (
            {event.kind for event in pair.given if event.grant == grant},
            {event.kind for event in pair.taken if event.grant == grant} - {KvEventKind.RECEIVING},
        )


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.pair.close()


ACKNOWLEDGED, LANDED, FAILED = (
    {KvEventKind.ACKNOWLEDGED},
    {KvEventKind.LANDED},
    {KvEventKind.FAILED},
)


def test_the_wire_is_as_long_as_the_cuts_below_assume(rig: Rig) -> None:
    rig.faults = Faults(cut_at_byte=WIRE_BYTES)
    assert rig.kinds(rig.give()) == (ACKNOWLEDGED, LANDED)


def test_a_link_cut_at_any_byte_fails_both_sides_and_a_new_link_serves_the_next_grant(
    rig: Rig,
) -> None:
    for at in range(0, WIRE_BYTES, 7):
        rig.faults = Faults(cut_at_byte=at)
        given, taken = rig.kinds(rig.give())
        assert given == FAILED, at
        assert taken == (FAILED if at >= HEADER_BYTES else set()), at
        rig.pair.assert_untouched(but=(10, 20))
    rig.faults = Faults()
    assert rig.kinds(rig.give()) == (ACKNOWLEDGED, LANDED)
    rig.pair.assert_copied((1, 2), (10, 20))


def test_a_flipped_bit_anywhere_never_lands(rig: Rig) -> None:
    for at in range(0, WIRE_BYTES, 5):
        rig.faults = Faults(flip_at_byte=at)
        given, taken = rig.kinds(rig.give())
        assert given == FAILED, at
        assert taken <= FAILED, at
        rig.pair.assert_untouched(but=(10, 20))


def test_a_lost_frame_never_lands(rig: Rig) -> None:
    for index in range(NUM_FRAMES):
        rig.faults = Faults(lose_frames=frozenset({index}))
        assert rig.kinds(rig.give()) == (FAILED, FAILED if index else set())


def test_a_lost_answer_leaves_the_giver_waiting_and_the_taker_landed(rig: Rig) -> None:
    rig.faults = Faults(lose_replies=True)
    grant = rig.give()
    assert rig.kinds(grant) == (set(), LANDED)
    rig.pair.giver.abandon(grant)
    assert rig.pair.giver.ledger()["grants_given"] == 0


def test_delay_is_kept_by_the_clock(rig: Rig) -> None:
    rig.faults = Faults(delay_s=1.0)
    grant = rig.give()
    rig.clock.turn(0.5)
    rig.pair.turn()
    assert rig.kinds(grant) == (set(), set())
    rig.clock.turn(0.5)
    rig.pair.turn()
    assert rig.kinds(grant) == (ACKNOWLEDGED, LANDED)


def test_frames_under_way_when_a_grant_is_revoked_are_not_written(rig: Rig) -> None:
    rig.faults = Faults(delay_s=1.0)
    grant = rig.give()
    rig.pair.taker.revoke(grant)
    rig.clock.turn(1.0)
    rig.pair.turn()
    rig.pair.turn()
    assert rig.kinds(grant) == (FAILED, {KvEventKind.RELEASED})
    rig.pair.assert_untouched()
