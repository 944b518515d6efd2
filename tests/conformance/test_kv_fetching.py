"""What every KvTransport promises when the taker fetches (PULL), beside what it promises either way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.kv_pair import DIGEST, Pair, make_memory, read_grant
from tests.conformance.test_kv_transport import MAKERS, land, pair_of
from xllm_py.core.kv_memory import KvLayout
from xllm_py.transport.base import GiverGrant, KvEventKind, TakerGrant

ACKNOWLEDGED, LANDED = KvEventKind.ACKNOWLEDGED, KvEventKind.LANDED
FAILED, RELEASED = KvEventKind.FAILED, KvEventKind.RELEASED


@pytest.fixture(params=list(MAKERS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from pair_of(request.param, pull=True)


def open_grant(pair: Pair, name: bytes, **fields: object) -> int:
    """D opens a grant for two blocks, to be fetched from P; the number of the stream."""
    wanted: dict[str, object] = {
        "peer_incarnation": "p-1",
        "block_size": 4,
        "block_ids": (10, 11),
        "first_wanted": 0,
        "prompt_digest": DIGEST,
        "sources": (pair.giver.endpoint,),
        "read_grant": read_grant(name),
        **fields,
    }
    return pair.taker.open_grant(TakerGrant(grant=name, **wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["giver", "taker"])
def test_it_does_not_matter_who_hears_of_the_grant_first(pair: Pair, first: str) -> None:
    name = b"g" * 16
    if first == "taker":
        open_grant(pair, name)
        pair.turn(0.1)
    pair.give(name, (1, 2))
    if first == "giver":
        pair.turn(0.1)
        open_grant(pair, name)
    pair.given_event(ACKNOWLEDGED, name)
    pair.taken_event(LANDED, name)
    pair.assert_copied((1, 2), (10, 11))


def test_nothing_is_sent_that_was_not_asked_for_by_its_read_grant(pair: Pair) -> None:
    other = land(pair, (1, 2), (20, 21))
    moved = pair.giver.ledger()["bytes_sent"]
    name = b"g" * 16
    open_grant(pair, name, read_grant=b"an invented one.")
    pair.give(name, (3, 4))
    land(pair, (5, 6), (22, 23))  # the same link serves others meanwhile
    assert pair.giver.ledger()["bytes_sent"] == 2 * moved
    assert all(event.grant != name for event in pair.given + pair.taken)
    pair.assert_untouched(but=(20, 21, 22, 23))
    pair.giver.abandon(name)
    assert other


def test_a_read_grant_is_good_for_the_peer_it_was_given_to(pair: Pair) -> None:
    name = b"g" * 16
    memory = make_memory(None)
    thief = pair.add(memory=memory, incarnation="d-2")
    pair.give(name, (1, 2))
    thief.open_grant(
        TakerGrant(
            grant=name,
            peer_incarnation="p-1",
            block_size=4,
            block_ids=(10, 11),
            first_wanted=0,
            prompt_digest=DIGEST,
            sources=(pair.giver.endpoint,),
            read_grant=read_grant(name),
        )
    )
    for _ in range(10):
        pair.turn(0.02)
    assert memory.span(0, 0, 10) == make_memory(None).span(0, 0, 10)
    open_grant(pair, name)
    pair.given_event(ACKNOWLEDGED, name)
    pair.assert_copied((1, 2), (10, 11))
    assert memory.span(0, 0, 10) == make_memory(None).span(0, 0, 10)


def test_nobody_at_the_source_fails_the_grant_and_frees_its_blocks(pair: Pair) -> None:
    open_grant(pair, b"g" * 16, sources=("127.0.0.1:9",))
    assert pair.taken_event(FAILED, b"g" * 16).text
    pair.taker.revoke(b"g" * 16)
    pair.taken_event(RELEASED, b"g" * 16)


def test_a_restarted_giver_is_not_the_one_that_was_meant(pair: Pair) -> None:
    open_grant(pair, b"g" * 16, peer_incarnation="p-0")
    assert pair.taken_event(FAILED, b"g" * 16).text


def test_a_giver_that_closes_fails_what_is_fetched_from_it(pair: Pair) -> None:
    begun, waiting = pair.grant((10, 11)), pair.grant((12,))
    pair.connect(begun)
    pair.giver.push(begun, 0, 0, (1, 2))
    pair.until("the first layer", lambda: pair.taker.ledger()["bytes_received"] > 0)
    pair.giver.close()
    pair.giver = pair.make(memory=make_memory(1), incarnation="p-2")
    pair.taken_event(FAILED, begun)
    open_grant(pair, b"g" * 16)
    pair.taken_event(FAILED, b"g" * 16)
    assert waiting


def test_an_invented_grant_is_refused_by_the_taker(pair: Pair) -> None:
    open_grant(pair, b"g" * 16)
    invented = b"?" * 16
    pair.giver.connect(
        GiverGrant(
            grant=invented,
            endpoints=(),
            peer_incarnation="d-1",
            block_size=4,
            prompt_digest=DIGEST,
            read_grant=read_grant(b"g" * 16),
        )
    )
    pair.push(invented, (1, 2))
    assert "unknown" in pair.given_event(FAILED, invented).text
    pair.assert_untouched()


@pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 20])
def test_a_fetched_probe_comes_and_touches_nothing(pair: Pair, num_bytes: int) -> None:
    probe = GiverGrant(
        grant=b"p" * 16,
        endpoints=(pair.giver.endpoint,),
        peer_incarnation="p-1",
        block_size=4,
        prompt_digest=b"",
    )
    for _ in range(2):
        pair.taker.probe(probe, num_bytes, fetch=True)
        event = pair.taken_event(ACKNOWLEDGED, b"p" * 16)
        assert event.num_bytes == num_bytes and event.seconds >= 0
        pair.taken.clear()
    pair.assert_untouched()
    assert pair.given == []
    assert pair.giver.ledger()["grants_given"] == 0
    land(pair, (1, 2), (20, 21))


def test_a_probe_that_cannot_be_fetched_fails(pair: Pair) -> None:
    for name, endpoint, peer in (
        (b"p" * 16, pair.giver.endpoint, "p-0"),
        (b"q" * 16, "127.0.0.1:9", "p-1"),
    ):
        probe = GiverGrant(
            grant=name,
            endpoints=(endpoint,),
            peer_incarnation=peer,
            block_size=4,
            prompt_digest=b"",
        )
        pair.taker.probe(probe, 64, fetch=True)
        assert pair.taken_event(FAILED, name).text


@pytest.mark.parametrize("pair", [kind for kind in MAKERS if kind != "memory"], indirect=True)
def test_a_layout_that_differs_is_refused_when_the_taker_calls(pair: Pair) -> None:
    other = KvLayout(num_layers=3, block_size=4, block_bytes=96, shape="another dtype")
    stranger = pair.add(memory=make_memory(3, other), incarnation="p-3")
    open_grant(pair, b"g" * 16, sources=(stranger.endpoint,), peer_incarnation="p-3")
    pair.give(b"g" * 16, (1, 2))
    assert "layout" in pair.taken_event(FAILED, b"g" * 16).text
    pair.assert_untouched()
