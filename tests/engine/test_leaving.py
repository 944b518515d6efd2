"""What leaves with the layers of a step: every claimed block once for each layer, in order, when enough has come together or at the end."""

from __future__ import annotations

from typing import cast

import pytest

from xllm_py.base.errors import LayoutMismatch
from xllm_py.core.kv_memory import PARTS, KvLayout
from xllm_py.engine.leaving import PUSH_BYTES, Leaving
from xllm_py.transport.base import KvTransport

LAYERS = 5


class Recorded:
    """The part of KvTransport that is asked here."""

    def __init__(self) -> None:
        self.pushed: list[tuple[bytes, int, int, tuple[int, ...]]] = []

    def push(self, grant: bytes, layer: int, first: int, block_ids: tuple[int, ...]) -> None:
        """Remember it."""
        self.pushed.append((grant, layer, first, block_ids))


def leaving(block_bytes: int) -> tuple[Leaving, Recorded]:
    layout = KvLayout(num_layers=LAYERS, block_size=4, block_bytes=block_bytes, shape="test")
    transport = Recorded()
    return Leaving(layout, cast("KvTransport", transport)), transport


def test_layers_that_hold_much_leave_one_by_one() -> None:
    made, transport = leaving(PUSH_BYTES // PARTS)
    made.begin()
    made.claim(b"a", 2, (7,), 4)
    for layer in range(LAYERS):
        made.stored(layer)
        assert transport.pushed[-1] == (b"a", layer, 2, (7,))
    assert len(transport.pushed) == LAYERS


def test_layers_that_hold_little_leave_together() -> None:
    made, transport = leaving(PUSH_BYTES // PARTS // 4)
    made.begin()
    made.claim(b"a", 0, (7,), 4)
    made.claim(b"b", 3, (8,), 4)
    made.stored(0)
    assert not transport.pushed
    made.stored(1)
    assert transport.pushed == [
        (grant, layer, *rest)
        for layer in (0, 1)
        for grant, *rest in ((b"a", 0, (7,)), (b"b", 3, (8,)))
    ]
    for layer in range(2, LAYERS):
        made.stored(layer)
    assert [push[:2] for push in transport.pushed] == [
        (grant, layer) for layer in range(LAYERS) for grant in (b"a", b"b")
    ]


@pytest.mark.parametrize("known_after", range(LAYERS + 1))
@pytest.mark.parametrize("first_claim", [True, False])
def test_a_claim_in_mid_step_misses_no_layer(known_after: int, first_claim: bool) -> None:
    made, transport = leaving(64)
    made.begin()
    if not first_claim:
        made.claim(b"a", 0, (1,), 4)
    for layer in range(known_after):
        made.stored(layer)
    made.claim(b"b", 5, (2, 3), 2)
    for layer in range(known_after, LAYERS):
        made.stored(layer)
    for grant in {b"b"} if first_claim else {b"a", b"b"}:
        assert [push[1] for push in transport.pushed if push[0] == grant] == list(range(LAYERS))
    assert set(made.claimed()) == ({(b"b", 5)} if first_claim else {(b"a", 0), (b"b", 5)})


def test_the_next_step_knows_nothing_of_the_last() -> None:
    made, transport = leaving(64)
    made.begin()
    made.claim(b"a", 0, (1,), 4)
    made.stored(0)
    made.begin()
    for layer in range(LAYERS):
        made.stored(layer)
    assert not transport.pushed
    assert not list(made.claimed())


def test_without_a_transport_nothing_can_have_been_granted() -> None:
    layout = KvLayout(num_layers=1, block_size=4, block_bytes=64, shape="test")
    with pytest.raises(LayoutMismatch):
        _ = Leaving(layout, None).transport
