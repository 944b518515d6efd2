"""What every KvTransport promises, whatever carries the bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from unittest import mock

import psutil
import pytest

from tests.conformance.kv_pair import (
    FABRICS,
    LAYOUT,
    Pair,
    fabric_maker,
    make_memory,
    make_shared,
    make_streams,
    make_tcp,
    memory_maker,
    tls_maker,
)
from xllm_py.core.kv_memory import PARTS, KvLayout
from xllm_py.transport import stage
from xllm_py.transport.base import GiverGrant, KvEventKind

ACKNOWLEDGED, LANDED = KvEventKind.ACKNOWLEDGED, KvEventKind.LANDED
FAILED, RELEASED = KvEventKind.FAILED, KvEventKind.RELEASED


MAKERS = {
    "memory": memory_maker,
    "tcp": lambda: make_tcp,
    "tcp streams": lambda: make_streams,
    "tcp tls": tls_maker,
    "shared memory": lambda: make_shared,
    "fabric": lambda: fabric_maker("in memory"),
}
MAKERS |= {name: partial(fabric_maker, name) for name in FABRICS}
STAGED = {"tcp, staged": lambda: make_tcp, "shared memory, staged": lambda: make_shared}
MAKERS |= STAGED  # every frame goes through the stage, as frames of many small pieces do


def pair_of(kind: str, pull: bool) -> Iterator[Pair]:
    with mock.patch.object(stage, "MIN_PIECES", 1 if kind in STAGED else stage.MIN_PIECES):
        pair = Pair(MAKERS[kind](), pull=pull)
        pair.num_streams = 3 if kind == "tcp streams" else 1
        yield pair
        pair.close()


@pytest.fixture(params=[(kind, pull) for pull in (False, True) for kind in MAKERS], ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Pushing or fetching."""
    yield from pair_of(*request.param)


@pytest.fixture(params=list(MAKERS))
def pushing(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """P connects."""
    yield from pair_of(request.param, pull=False)


def land(pair: Pair, sources: tuple[int, ...], targets: tuple[int, ...]) -> bytes:
    grant = pair.grant(targets)
    pair.give(grant, sources)
    pair.given_event(ACKNOWLEDGED, grant)
    pair.taken_event(LANDED, grant)
    return grant


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ((5,), (9,)),
        ((4, 5, 6, 7), (20, 21, 22, 23)),
        ((31, 2, 17, 3, 4, 0), (0, 30, 5, 7, 6, 31)),
        (tuple(range(32)), tuple(reversed(range(32)))),
    ],
    ids=["one block", "adjacent", "scattered", "all"],
)
def test_blocks_arrive_in_the_blocks_that_the_grant_names_and_in_no_others(
    pair: Pair, sources: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    land(pair, sources, targets)
    pair.assert_copied(sources, targets)
    pair.assert_untouched(but=targets)


def test_both_sides_tell_how_much_moved(pair: Pair) -> None:
    grant = land(pair, (1, 2), (3, 4))
    moved = 2 * LAYOUT.num_layers * PARTS * LAYOUT.block_bytes
    assert pair.given_event(ACKNOWLEDGED, grant).num_bytes == moved
    assert pair.taken_event(LANDED, grant).num_bytes == moved
    assert pair.given_event(ACKNOWLEDGED, grant).seconds >= 0
    assert pair.giver.ledger()["bytes_sent"] == moved
    assert pair.taker.ledger()["bytes_received"] == moved


def test_blocks_come_chunk_by_chunk_and_layer_by_layer(pair: Pair) -> None:
    sources, targets = (3, 9, 1, 20, 21), (8, 7, 6, 30, 2)
    grant = pair.grant(targets)
    pair.connect(grant)
    for first, count in ((0, 1), (1, 3), (4, 1)):
        for layer in range(LAYOUT.num_layers):
            pair.giver.push(grant, layer, first, sources[first : first + count])
            pair.turn()
    pair.giver.commit(grant)
    pair.taken_event(LANDED, grant)
    pair.assert_copied(sources, targets)


def test_a_grant_whose_blocks_the_taker_holds_all_needs_only_its_commit(pair: Pair) -> None:
    grant = pair.grant((10, 11), first_wanted=2)
    pair.connect(grant)
    pair.giver.commit(grant)
    pair.given_event(ACKNOWLEDGED, grant)
    assert pair.taken_event(LANDED, grant).num_bytes == 0
    pair.assert_untouched(but=())


def test_blocks_that_the_taker_holds_already_are_not_written(pair: Pair) -> None:
    grant = pair.grant((10, 11, 12), first_wanted=2)
    pair.give(grant, (5,), first=2)
    pair.taken_event(LANDED, grant)
    pair.assert_copied((5,), (12,))
    pair.assert_untouched(but=(12,))


def test_a_grant_that_wants_nothing_lands_by_its_commit(pair: Pair) -> None:
    grant = pair.grant((10, 11), first_wanted=2)
    pair.connect(grant)
    pair.giver.commit(grant)
    pair.taken_event(LANDED, grant)
    pair.given_event(ACKNOWLEDGED, grant)
    pair.assert_untouched()


def test_a_held_block_is_refused_when_it_is_pushed(pair: Pair) -> None:
    grant = pair.grant((10, 11), first_wanted=1)
    pair.connect(grant)
    pair.push(grant, (1, 2), first=0)
    assert "outside" in pair.given_event(FAILED, grant).text
    pair.assert_untouched()


def test_the_same_blocks_twice_are_fine(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant)
    pair.push(grant, (1, 2))
    pair.push(grant, (1, 2))
    pair.giver.commit(grant)
    pair.taken_event(LANDED, grant)
    pair.assert_copied((1, 2), (10, 11))


def test_a_block_that_comes_again_with_other_content_ends_the_grant(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant)
    pair.push(grant, (1, 2))
    pair.push(grant, (3, 4))
    pair.given_event(FAILED, grant)
    pair.taken_event(FAILED, grant)


def test_a_commit_with_holes_ends_the_grant_on_both_sides(pair: Pair) -> None:
    grant = pair.grant((10, 11, 12))
    pair.give(grant, (1, 2))
    assert "before every wanted block" in pair.given_event(FAILED, grant).text
    assert "before every wanted block" in pair.taken_event(FAILED, grant).text
    assert pair.taker.ledger()["frames_rejected"] == 1


def test_kv_of_another_prompt_never_lands(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant, digest=b"other prompt 16b")
    pair.push(grant, (1, 2))
    pair.giver.commit(grant)
    assert "digest" in pair.taken_event(FAILED, grant).text
    pair.given_event(FAILED, grant)


def test_a_grant_of_another_peer_cannot_be_used(pushing: Pair) -> None:
    grant = pushing.grant((10, 11), peer="p-2")
    pushing.give(grant, (1, 2))
    assert "unknown" in pushing.given_event(FAILED, grant).text
    pushing.assert_untouched()
    assert pushing.taker.ledger()["frames_rejected"] == 1


def test_an_invented_grant_cannot_be_used(pushing: Pair) -> None:
    pushing.give(b"?" * 16, (1, 2))
    assert "unknown" in pushing.given_event(FAILED, b"?" * 16).text
    pushing.assert_untouched()


def test_a_restarted_taker_is_not_the_one_that_gave_the_grant(pushing: Pair) -> None:
    grant = pushing.grant((10, 11))
    pushing.connect(grant, incarnation="d-0")
    pushing.push(grant, (1, 2))
    assert "another process" in pushing.given_event(FAILED, grant).text
    pushing.assert_untouched()


def test_a_peer_with_another_cluster_key_gets_no_link(pushing: Pair) -> None:
    stranger = pushing.add(memory=make_memory(3), incarnation="p-1", cluster_key=b"x" * 32)
    grant = pushing.grant((10, 11))
    pushing.connect(grant, giver=stranger)
    stranger.push(grant, 0, 0, (1, 2))
    assert "cluster key" in pushing.given_event(FAILED, grant).text
    pushing.assert_untouched()


def test_a_peer_with_another_layout_gets_no_link(pushing: Pair) -> None:
    other = KvLayout(num_layers=3, block_size=4, block_bytes=96, shape="another dtype")
    stranger = pushing.add(memory=make_memory(3, other), incarnation="p-1")
    grant = pushing.grant((10, 11))
    pushing.connect(grant, giver=stranger)
    stranger.push(grant, 0, 0, (1, 2))
    assert "layout" in pushing.given_event(FAILED, grant).text
    pushing.assert_untouched()


def test_nobody_at_the_endpoint_fails_the_grant(pushing: Pair) -> None:
    grant = pushing.grant((10, 11))
    endpoint = pushing.taker.endpoint
    pushing.taker.close()
    pushing.taker = pushing.make(memory=make_memory(None), incarnation="d-2")
    assert pushing.taker.endpoint != endpoint
    pushing.giver.connect(
        GiverGrant(
            grant=grant,
            endpoints=(endpoint,),
            peer_incarnation="d-1",
            block_size=4,
            prompt_digest=b"",
        )
    )
    pushing.given_event(FAILED, grant)
    assert pushing.giver.ledger()["grants_given"] == 0


def test_nothing_is_written_after_revoke_and_the_link_serves_the_others(pair: Pair) -> None:
    revoked, other = pair.grant((10, 11)), pair.grant((12, 13))
    pair.connect(revoked)
    pair.connect(other)
    pair.taker.revoke(revoked)
    pair.taken_event(RELEASED, revoked)
    pair.push(revoked, (1, 2))
    pair.push(other, (3, 4))
    pair.giver.commit(other)
    assert "revoked" in pair.given_event(FAILED, revoked).text
    pair.given_event(ACKNOWLEDGED, other)
    pair.assert_copied((3, 4), (12, 13))
    pair.assert_untouched(but=(12, 13))


def test_revoke_in_the_middle_releases_and_later_frames_are_sunk(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant)
    pair.giver.push(grant, 0, 0, (1, 2))
    pair.until("the first layer", lambda: pair.taker.ledger()["bytes_received"] > 0)
    pair.taker.revoke(grant)
    pair.taken_event(RELEASED, grant)
    written = [bytes(pair.taker_memory.span(layer, 0, 10, 2)) for layer in range(3)]
    pair.giver.push(grant, 1, 0, (1, 2))
    pair.giver.commit(grant)
    pair.given_event(FAILED, grant)
    assert [bytes(pair.taker_memory.span(layer, 0, 10, 2)) for layer in range(3)] == written
    assert pair.taker.ledger()["grants_open"] == 0


def test_a_landed_grant_is_forgotten_by_revoke_and_takes_no_more_frames(pushing: Pair) -> None:
    grant = land(pushing, (1, 2), (10, 11))
    pushing.taker.revoke(grant)
    pushing.taken_event(RELEASED, grant)
    assert pushing.taker.ledger()["grants_open"] == 0
    pushing.connect(grant)
    pushing.push(grant, (3, 4))
    pushing.given_event(FAILED, grant)
    pushing.assert_copied((1, 2), (10, 11))


def test_a_landed_grant_takes_no_second_commit(pushing: Pair) -> None:
    grant = land(pushing, (1, 2), (10, 11))
    pushing.give(grant, (3, 4))
    assert "no more" in pushing.given_event(FAILED, grant).text
    pushing.assert_copied((1, 2), (10, 11))


def test_revoking_an_unknown_grant_says_released(pair: Pair) -> None:
    pair.taker.revoke(b"u" * 16)
    pair.taken_event(RELEASED, b"u" * 16)


def test_a_taker_that_closes_fails_the_grants_of_its_givers(pair: Pair) -> None:
    first, second = pair.grant((10, 11)), pair.grant((12,))
    pair.connect(first)
    pair.connect(second)
    pair.giver.push(first, 0, 0, (1, 2))
    pair.until("the first layer", lambda: pair.taker.ledger()["bytes_received"] > 0)
    pair.taker.close()
    pair.taker = pair.make(memory=make_memory(None), incarnation="d-2")
    pair.given_event(FAILED, first)
    pair.given_event(FAILED, second)


def test_a_giver_that_closes_fails_what_it_had_begun(pushing: Pair) -> None:
    begun, waiting = pushing.grant((10, 11)), pushing.grant((12,))
    pushing.connect(begun)
    pushing.connect(waiting)
    pushing.giver.push(begun, 0, 0, (1, 2))
    pushing.until("the first layer", lambda: pushing.taker.ledger()["bytes_received"] > 0)
    pushing.giver.close()
    pushing.giver = pushing.make(memory=make_memory(1), incarnation="p-2")
    pushing.taken_event(FAILED, begun)
    assert all(event.grant != waiting for event in pushing.taken)


def test_a_new_link_is_opened_after_one_failed(pair: Pair) -> None:
    broken = pair.grant((10, 11))
    pair.give(broken, (1,))
    pair.given_event(FAILED, broken)
    land(pair, (1, 2), (20, 21))
    pair.assert_copied((1, 2), (20, 21))


def test_many_grants_share_a_link_and_come_interleaved(pair: Pair) -> None:
    grants = [pair.grant((index, 31 - index)) for index in range(8)]
    sources = [(index + 3, index + 12) for index in range(8)]
    for grant in grants:
        pair.connect(grant)
    for layer in range(LAYOUT.num_layers):
        for grant, blocks in zip(grants, sources, strict=True):
            pair.giver.push(grant, layer, 0, blocks)
    for grant in reversed(grants):
        pair.giver.commit(grant)
    for grant in grants:
        pair.given_event(ACKNOWLEDGED, grant)
        pair.taken_event(LANDED, grant)
    for index, blocks in enumerate(sources):
        pair.assert_copied(blocks, (index, 31 - index))
    assert pair.giver.ledger()["links"] == pair.num_streams


def test_an_abandoned_grant_is_silent(pair: Pair) -> None:
    abandoned, other = pair.grant((10, 11)), pair.grant((12, 13))
    pair.connect(abandoned)
    pair.connect(other)
    pair.push(abandoned, (1, 2))
    pair.giver.abandon(abandoned)
    pair.giver.push(abandoned, 0, 0, (3, 4))
    pair.giver.commit(abandoned)
    pair.push(other, (5, 6))
    pair.giver.commit(other)
    pair.given_event(ACKNOWLEDGED, other)
    # what came before may be told of, when it took a second
    told = [each for each in pair.given + pair.taken if each.kind is not KvEventKind.RECEIVING]
    assert all(event.grant != abandoned for event in told)
    assert pair.giver.ledger()["grants_given"] == 0


def test_blocks_may_change_once_their_grant_is_abandoned(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant)
    pair.push(grant, (1, 2))
    pair.giver.abandon(grant)
    before = {
        layer: [bytes(pair.giver_memory.span(layer, 0, block)) for block in (1, 2)]
        for layer in range(LAYOUT.num_layers)
    }
    for layer in range(LAYOUT.num_layers):
        pair.giver_memory.span(layer, 0, 1, 2)[:] = bytes(2 * LAYOUT.block_bytes)
    probe = pair.grant((20,))
    pair.give(probe, (9,))
    pair.given_event(ACKNOWLEDGED, probe)
    for layer, contents in before.items():
        for block, content in zip((10, 11), contents, strict=True):
            assert bytes(pair.taker_memory.span(layer, 0, block)) != bytes(LAYOUT.block_bytes)
            assert bytes(pair.taker_memory.span(layer, 0, block)) in (
                content,
                b"\xc5" * LAYOUT.block_bytes,
            )


def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    for make in (make_tcp, memory_maker(), tls_maker(), make_shared, fabric_maker("in memory")):
        threads, descriptors = threading.active_count(), psutil.Process().num_fds()
        for pull in (False, True, False, True):
            pair = Pair(make, pull=pull)
            land(pair, (1, 2), (10, 11))
            pair.close()
            pair.close()
        # what an earlier test left may go meanwhile
        assert threading.active_count() <= threads
        assert psutil.Process().num_fds() <= descriptors


def test_the_taker_is_told_that_blocks_keep_coming(pair: Pair) -> None:
    grant = pair.grant((10, 11))
    pair.connect(grant)
    pair.giver.push(grant, 0, 0, (1, 2))
    pair.taken_event(KvEventKind.RECEIVING, grant)
    pair.giver.push(grant, 1, 0, (1, 2))
    pair.giver.push(grant, 2, 0, (1, 2))
    pair.giver.commit(grant)
    pair.taken_event(LANDED, grant)
    told = [event for event in pair.taken if event.kind is KvEventKind.RECEIVING]
    assert len(told) == 1  # not once a frame


def probe_of(pair: Pair, name: bytes, incarnation: str = "d-1") -> GiverGrant:
    return GiverGrant(
        grant=name,
        endpoints=(pair.taker.endpoint,),
        peer_incarnation=incarnation,
        block_size=4,
        prompt_digest=b"",
    )


@pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 20])
def test_a_probe_comes_back_and_touches_nothing(pushing: Pair, num_bytes: int) -> None:
    pushing.giver.probe(probe_of(pushing, b"p" * 16), num_bytes)
    event = pushing.given_event(ACKNOWLEDGED, b"p" * 16)
    assert event.num_bytes in (0, num_bytes)
    assert event.seconds >= 0
    pushing.assert_untouched()
    assert pushing.taken == []
    counts = pushing.giver.ledger() | {"received": pushing.taker.ledger()["bytes_received"]}
    assert (counts["bytes_sent"], counts["received"], counts["grants_given"]) == (0, 0, 0)
    land(pushing, (1, 2), (20, 21))


def test_a_probe_of_somebody_who_is_not_there_fails(pushing: Pair) -> None:
    pushing.giver.probe(probe_of(pushing, b"p" * 16, "d-0"), 64)
    assert "another process" in pushing.given_event(FAILED, b"p" * 16).text
    nobody = GiverGrant(
        grant=b"q" * 16,
        endpoints=("127.0.0.1:1",),
        peer_incarnation="d-1",
        block_size=4,
        prompt_digest=b"",
    )
    pushing.giver.probe(nobody, 64)
    assert pushing.given_event(FAILED, b"q" * 16).text


def test_an_abandoned_probe_is_silent(pushing: Pair) -> None:
    pushing.giver.probe(probe_of(pushing, b"p" * 16), 64)
    pushing.giver.abandon(b"p" * 16)
    land(pushing, (1, 2), (20, 21))
    assert b"p" * 16 not in {event.grant for event in pushing.given}
