"""Rows N-1 to N-9 of the fault matrix on one KV link: what breaks on the way is sent again, lands once, and lands right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.kv_pair import LAYOUT, Pair, make_tcp
from tests.transport.fault_proxy import GREETING_BYTES, PASS, Fault, FaultProxy
from xllm_py.core.kv_memory import PARTS
from xllm_py.transport.base import KvEventKind
from xllm_py.transport.kv_giving import MAX_TRIES
from xllm_py.wire import codec

SOURCES, TARGETS = (5, 6, 7, 2), (20, 9, 10, 30)
FRAMES = LAYOUT.num_layers * PARTS  # each holds all four blocks; then COMMIT
FRAME_BYTES = codec.HEADER_BYTES + len(SOURCES) * LAYOUT.block_bytes
WIRE_BYTES = GREETING_BYTES + FRAMES * FRAME_BYTES + codec.HEADER_BYTES + codec.COMMIT_BYTES
CALL_BYTES = codec.HELLO_BYTES + codec.HEADER_BYTES  # what a taker that fetches says beside
BACK_BYTES = codec.HELLO_BYTES + codec.PROOF_BYTES + codec.HEADER_BYTES
EDGES = sorted(
    {0, 1, 63, 64, 65, WIRE_BYTES - 1, WIRE_BYTES - 2}
    | {GREETING_BYTES + n * FRAME_BYTES + d for n in range(FRAMES + 1) for d in (-1, 0, 1)}
)
SOME = sorted(random.Random(4).sample(range(WIRE_BYTES), 50))


@pytest.fixture(params=[False, True], ids=["push", "pull"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(make_tcp, pull=request.param)
    yield made
    made.close()


def back_bytes(pair: Pair) -> int:
    """What the taker says in all."""
    return BACK_BYTES + (CALL_BYTES if pair.pull else 0)


def first(fault: Fault) -> Callable[[int], Fault]:
    """Only the first connection is ill."""
    return lambda n: fault if n == 0 else PASS


class Through:
    """A pair with the proxy between."""

    def __init__(self, pair: Pair, plan: Callable[[int], Fault]) -> None:
        self.pair = pair
        target = pair.giver if pair.pull else pair.taker
        self.proxy = FaultProxy(target.endpoint, plan, called=pair.pull)
        pair.way = self.proxy.endpoint

    def __enter__(self) -> Through:
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.close()

    def give(self) -> bytes:
        grant = self.pair.grant(TARGETS)
        self.pair.give(grant, SOURCES)
        return grant

    def assert_lands(self) -> None:
        pair = self.pair
        pair.wipe(TARGETS)
        grant = self.give()
        pair.given_event(KvEventKind.ACKNOWLEDGED, grant)
        pair.taken_event(KvEventKind.LANDED, grant)
        pair.assert_copied(SOURCES, TARGETS)
        pair.assert_untouched(but=TARGETS)
        landed = [event.grant for event in pair.taken if event.kind is KvEventKind.LANDED]
        assert landed.count(grant) == 1
        pair.taker.revoke(grant)
        pair.taken_event(KvEventKind.RELEASED, grant)


@pytest.mark.parametrize("kind", ["reset", "fin"])
def test_a_link_that_ends_at_any_byte_is_opened_again(pair: Pair, kind: str) -> None:
    """N-1, N-2."""
    for at in [*EDGES, *SOME]:
        with Through(pair, first(Fault(kind, at))) as through:
            through.assert_lands()
            assert through.proxy.num_connections == 2


@pytest.mark.parametrize("kind", ["reset", "fin"])
def test_an_answer_that_is_lost_is_asked_for_on_the_next_link(pair: Pair, kind: str) -> None:
    size = back_bytes(pair)
    for at in (0, size - 65, size - 64, size - 1):
        with Through(pair, first(Fault(kind, at, back=True))) as through:
            through.assert_lands()
            assert through.proxy.num_connections == 2


@pytest.mark.parametrize("at", [10, GREETING_BYTES + 40, GREETING_BYTES + 100, WIRE_BYTES - 1])
def test_a_link_on_which_nothing_moves_any_more_is_left(pair: Pair, at: int) -> None:
    """N-3."""
    with Through(pair, first(Fault("stall", at))) as through:
        through.assert_lands()


@pytest.mark.parametrize("back", [False, True])
def test_a_flipped_bit_is_seen_and_what_it_spoilt_comes_again(pair: Pair, back: bool) -> None:
    """N-4."""
    size = back_bytes(pair) if back else WIRE_BYTES
    for at in sorted(random.Random(5).sample(range(size), 100)):
        with Through(pair, first(Fault("flip", at, back=back))) as through:
            through.assert_lands()


@pytest.mark.parametrize("kind", ["dup frame", "drop frame", "swap frames", "replay"])
@pytest.mark.parametrize("at", [0, 1, FRAMES - 1, FRAMES])
def test_frames_out_of_order_end_the_link_and_not_the_grant(pair: Pair, kind: str, at: int) -> None:
    """N-5, N-6, N-7."""
    with Through(pair, first(Fault(kind, at))) as through:
        through.assert_lands()


@pytest.mark.parametrize("kind", ["dup", "drop"])
def test_bytes_that_come_twice_or_never_end_the_link_and_not_the_grant(
    pair: Pair, kind: str
) -> None:
    """N-5, N-7. What is missing at the end of a link is waited for a second, hence few places."""
    for at in (GREETING_BYTES, GREETING_BYTES + 64, GREETING_BYTES + 300, WIRE_BYTES - 64):
        with Through(pair, first(Fault(kind, at))) as through:
            through.assert_lands()


@pytest.mark.parametrize("fault", [Fault(rate=20_000.0), Fault(delay_s=0.1)], ids=["slow", "far"])
def test_a_slow_or_distant_link_is_only_that(pair: Pair, fault: Fault) -> None:
    """N-8, N-9."""
    with Through(pair, lambda _: fault) as through:
        through.assert_lands()
        assert through.proxy.num_connections == 1


def test_a_way_that_spoils_every_link_fails_the_grant_after_a_few(pair: Pair) -> None:
    with Through(pair, lambda _: Fault("flip", WIRE_BYTES - 1)) as through:
        grant = through.give()
        pair.given_event(KvEventKind.FAILED, grant)
        assert through.proxy.num_connections == MAX_TRIES
    pair.taker.revoke(grant)
    pair.taken_event(KvEventKind.RELEASED, grant)


def test_other_grants_of_a_broken_link_land_too(pair: Pair) -> None:
    with Through(pair, first(Fault("reset", GREETING_BYTES + 3 * FRAME_BYTES + 5))):
        grants = []
        for base in (0, 4, 8):
            grant = pair.grant(tuple(range(base + 16, base + 20)))
            pair.connect(grant)
            grants.append(grant)
        for layer in range(LAYOUT.num_layers):  # interleaved, as layers of one step are
            for index, grant in enumerate(grants):
                pair.giver.push(grant, layer, 0, tuple(range(4 * index, 4 * index + 4)))
        for grant in grants:
            pair.giver.commit(grant)
        for grant in grants:
            pair.given_event(KvEventKind.ACKNOWLEDGED, grant)
            pair.taken_event(KvEventKind.LANDED, grant)
        pair.assert_copied(tuple(range(12)), tuple(range(16, 28)))
        pair.assert_untouched(but=tuple(range(16, 28)))


def test_a_grant_revoked_while_the_link_was_down_is_told_so(pair: Pair) -> None:
    with Through(pair, first(Fault("fin", WIRE_BYTES - 1))) as through:
        through.proxy.at_byte = lambda: pair.taker.revoke((1).to_bytes(16, "big"))
        grant = through.give()
        assert "revoked" in pair.given_event(KvEventKind.FAILED, grant).text
    pair.taken_event(KvEventKind.RELEASED, grant)
