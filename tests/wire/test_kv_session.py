"""The machines of a KV link: who gets one, what is refused, in which order, and what a refusal leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.wire.kv_link import DIGEST, KEY, LAYOUT, Link, Taker, grant, identity
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import KvLayout
from xllm_py.wire import codec
from xllm_py.wire.codec import FrameType, Header, Reason, Step
from xllm_py.wire.kv_grants import MAX_REMEMBERED, GrantState, GrantTable
from xllm_py.wire.kv_handshake import Peer, answering
from xllm_py.wire.kv_session import (
    Acknowledged,
    Again,
    Asked,
    Closed,
    Fetched,
    GiverSession,
    Landed,
    Late,
    Probed,
    Refused,
    Reject,
    Stored,
    Take,
    Taken,
)
from xllm_py.wire.kv_taker import MAX_LATE_FRAMES, TakerSession

BLOCK = b"x" * LAYOUT.block_bytes


@pytest.fixture
def taker() -> Taker:
    return Taker()


@pytest.fixture
def link(taker: Taker) -> Link:
    return taker.link()


# ---- handshake


def shake(giver: GiverSession, taker: TakerSession) -> tuple[object, object]:
    """What each side thinks of it: (giver, taker)."""
    welcome = taker.on_hello(giver.hello())
    assert isinstance(welcome, bytes)
    proof = giver.on_welcome(welcome)
    if not isinstance(proof, bytes):
        return proof, None
    return "open", taker.on_proof(proof) or "open"


def test_two_sides_with_one_key_open_a_link() -> None:
    giver = GiverSession(identity("p", 1), Peer("d"))
    assert shake(giver, TakerSession(identity("d", 2), GrantTable())) == ("open", "open")


def test_another_cluster_key_is_seen_by_the_giver_before_it_proves_anything() -> None:
    giver = GiverSession(identity("p", 1, key=b"x" * 32), Peer("d"))
    assert shake(giver, TakerSession(identity("d", 2), GrantTable()))[0] is Reason.WRONG_KEY


def test_a_giver_that_only_pretends_to_know_the_key_is_refused() -> None:
    taker = TakerSession(identity("d", 2), GrantTable())
    taker.on_hello(GiverSession(identity("p", 1), Peer("d")).hello())
    assert taker.on_proof(codec.pack_proof(b"?" * 32)) is Reason.WRONG_KEY


def test_a_recorded_handshake_does_not_open_a_second_link() -> None:
    giver = GiverSession(identity("p", 1), Peer("d"))
    welcome = TakerSession(identity("d", 2), GrantTable()).on_hello(giver.hello())
    assert isinstance(welcome, bytes)
    recorded = giver.on_welcome(welcome)
    assert isinstance(recorded, bytes)
    again = TakerSession(identity("d", 3), GrantTable())
    again.on_hello(giver.hello())
    assert again.on_proof(recorded) is Reason.WRONG_KEY


def test_the_takers_own_proof_cannot_be_sent_back_to_it() -> None:
    taker = TakerSession(identity("d", 2), GrantTable())
    welcome = taker.on_hello(GiverSession(identity("p", 1), Peer("d")).hello())
    assert isinstance(welcome, bytes)
    assert taker.on_proof(welcome[codec.HELLO_BYTES :]) is Reason.WRONG_KEY


def test_a_proof_without_a_hello_is_refused() -> None:
    taker = TakerSession(identity("d", 2), GrantTable())
    assert taker.on_proof(codec.pack_proof(bytes(32))) is Reason.WRONG_KEY


def test_another_incarnation_than_the_expected_one_is_refused() -> None:
    giver = GiverSession(identity("p", 1), Peer("d-before"))
    assert shake(giver, TakerSession(identity("d", 2), GrantTable()))[0] is Reason.WRONG_INCARNATION


def test_another_layout_is_refused_by_both() -> None:
    other = KvLayout(num_layers=3, block_size=4, block_bytes=8, shape="test")
    giver = GiverSession(identity("p", 1, layout=other), Peer("d"))
    taker = TakerSession(identity("d", 2), GrantTable())
    assert shake(giver, taker)[0] is Reason.WRONG_LAYOUT
    welcome = taker.on_hello(giver.hello())
    assert isinstance(welcome, bytes)
    agreed = identity("p", 1, layout=other).agreement(giver.hello() + welcome[: codec.HELLO_BYTES])
    assert taker.on_proof(codec.pack_proof(agreed.giver_proof)) is Reason.WRONG_LAYOUT


@pytest.mark.parametrize("place", [0, 5, 4])
def test_garbage_in_the_handshake_is_refused_by_both(place: int) -> None:
    giver = GiverSession(identity("p", 1), Peer("d"))
    taker = TakerSession(identity("d", 2), GrantTable())
    hello, welcome = bytearray(giver.hello()), taker.on_hello(giver.hello())
    assert isinstance(welcome, bytes)
    hello[place] ^= 0xFF
    damaged = bytearray(welcome)
    damaged[place] ^= 0xFF
    assert isinstance(taker.on_hello(bytes(hello)), Reason)
    assert isinstance(giver.on_welcome(bytes(damaged)), Reason)
    damaged = bytearray(welcome)
    damaged[codec.HELLO_BYTES + place] ^= 0xFF
    assert giver.on_welcome(bytes(damaged)) is Reason.BAD_FRAME
    assert taker.on_proof(bytes(damaged[codec.HELLO_BYTES :])) is Reason.BAD_FRAME


# ---- the order of the checks


def test_frames_land_and_are_acknowledged(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5, 9, 2)))
    log = link.give(1, 3)
    landed = link.commit(1, log.commit_payload(DIGEST))
    assert landed == Landed((1).to_bytes(16, "big"), 2 * 2 * 3 * LAYOUT.block_bytes)
    assert taker.written() == {2, 5, 9}
    assert link.giver.on_header(link.session.ack(b"g" * 16)) == Acknowledged(b"g" * 16)


def test_magic_is_checked_before_the_sequence_and_that_before_the_proof(link: Link) -> None:
    good = codec.pack_header(Header(type=1, seq=7), codec.Signer(b"another key"))
    assert link.session.on_header(b"?" + good[1:]) == Reject(Reason.BAD_FRAME)
    assert link.session.on_header(good) == Reject(Reason.BAD_SEQUENCE)
    good = codec.pack_header(Header(type=1, seq=0), codec.Signer(b"another key"))
    assert link.session.on_header(good) == Reject(Reason.BAD_MAC)


def test_a_frame_cannot_be_repeated_skipped_or_taken_from_another_link(
    taker: Taker, link: Link
) -> None:
    taker.grants.open(grant(1, (5, 9)))
    first, second = link.data(1, BLOCK), link.data(1, BLOCK, first=1)
    assert link.session.on_header(second) == Reject(Reason.BAD_SEQUENCE)
    assert link.arrive(first, BLOCK) == Stored()
    assert link.session.on_header(first) == Reject(Reason.BAD_SEQUENCE)
    assert taker.link().session.on_header(first) == Reject(Reason.BAD_MAC)
    assert taker.written() == {5}


def test_a_grant_is_known_to_its_peer_only(taker: Taker, link: Link) -> None:
    foreign = grant(1, (5,), peer="p2")
    taker.grants.open(foreign)
    for number in (1, 2):
        name = number.to_bytes(16, "big")
        header = link.data(number, BLOCK)
        assert link.session.on_header(header) == Reject(Reason.UNKNOWN_GRANT, name)
    assert foreign.state is GrantState.GRANTED


@pytest.mark.parametrize(
    "fields",
    [
        {"part": 2},
        {"part": 255},
        {"layer": LAYOUT.num_layers},
        {"layer": 65535},
        {"first": 0},  # held
        {"first": 3},
        {"first": 2**32 - 1},
        {"first": 2, "num_blocks": 2},
        {"num_blocks": 0},
        {"num_blocks": 65535},
    ],
)
def test_what_lies_outside_the_grant_is_refused_unread(
    taker: Taker, link: Link, fields: dict[str, int]
) -> None:
    taker.grants.open(grant(1, (5, 9, 2), first_wanted=1))
    header = link.data(1, BLOCK, **{"first": 1, **fields})
    assert link.session.on_header(header) == Reject(Reason.OUT_OF_RANGE, (1).to_bytes(16, "big"))


@pytest.mark.parametrize("length", [0, 7, 9, 4 << 20, 2**32 - 1])
def test_a_length_is_computed_and_never_believed(taker: Taker, link: Link, length: int) -> None:
    taker.grants.open(grant(1, (5,)))
    header = link.data(1, BLOCK, length=length)
    assert link.session.on_header(header) == Reject(Reason.BAD_LENGTH, (1).to_bytes(16, "big"))


def test_a_frame_larger_than_the_limit_is_refused_even_when_it_is_consistent() -> None:
    big = KvLayout(num_layers=1, block_size=4, block_bytes=3 << 20, shape="big")
    grants = GrantTable()
    giver = GiverSession(identity("p", 1, layout=big), Peer("d"))
    taker = TakerSession(identity("d", 2, layout=big), grants)
    assert shake(giver, taker) == ("open", "open")
    grants.open(grant(1, (0, 1)))
    _, data = giver.data((1).to_bytes(16, "big"), 0, 0, 0, 2, 0)
    assert taker.on_header(data) == Reject(Reason.BAD_LENGTH, (1).to_bytes(16, "big"))


def test_acks_do_not_flow_towards_the_taker(link: Link) -> None:
    assert link.session.on_header(link.forge(Header(type=FrameType.ACK, seq=0))) == Reject(
        Reason.BAD_FRAME
    )


def test_a_giver_that_says_error_closes_the_link(link: Link) -> None:
    header = Header(type=FrameType.ERROR, seq=0, num_blocks=Reason.CONFLICT)
    assert link.session.on_header(link.forge(header)) == Closed(Reason.CONFLICT, by_peer=True)
    header = Header(type=FrameType.ERROR, seq=0, num_blocks=9999)
    assert link.session.on_header(link.forge(header)) == Closed(Reason.BAD_FRAME, by_peer=True)


# ---- payloads


def test_a_damaged_payload_is_refused_and_may_come_again_on_another_link(
    taker: Taker, link: Link
) -> None:
    taker.grants.open(grant(1, (5,)))
    damaged = b"y" + BLOCK[1:]
    name = (1).to_bytes(16, "big")
    assert link.arrive(link.data(1, BLOCK), damaged) == Reject(Reason.BAD_CHECKSUM, name)
    log = taker.link().give(1, 1)
    assert isinstance(taker.link().commit(1, log.commit_payload(DIGEST)), Landed)


def test_a_payload_that_broke_off_may_come_again_on_another_link(taker: Taker, link: Link) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    take = link.session.on_header(link.data(1, BLOCK))
    assert isinstance(take, Take)
    link.session.on_lost(take)
    assert entry.in_flight == 0
    taker.link().give(1, 1)


def test_the_same_frame_again_is_read_and_not_written(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    link.arrive(link.data(1, BLOCK), BLOCK)
    take = link.session.on_header(link.data(1, BLOCK))
    assert isinstance(take, Take)
    assert not take.store
    assert link.session.on_payload(take, take.header.checksum) == Stored()


@pytest.mark.parametrize("fields", [{"checksum": 1}, {"first": 1, "num_blocks": 2, "length": 16}])
def test_a_block_that_comes_in_two_versions_ends_the_grant(
    taker: Taker, link: Link, fields: dict[str, int]
) -> None:
    entry = grant(1, (5, 9, 2))
    taker.grants.open(entry)
    link.arrive(link.data(1, BLOCK * 2), BLOCK * 2)
    reject = link.session.on_header(link.data(1, BLOCK * 2, **fields))
    assert reject == Reject(Reason.CONFLICT, entry.grant, failed=True)
    assert entry.state is GrantState.FAILED
    other = taker.link()
    header = other.data(1, BLOCK, first=2)
    assert other.session.on_header(header) == Reject(Reason.WRONG_STATE, entry.grant)


def test_two_links_cannot_write_one_block_at_the_same_time(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    assert isinstance(link.session.on_header(link.data(1, BLOCK)), Take)
    other = taker.link()
    reject = other.session.on_header(other.data(1, BLOCK))
    assert isinstance(reject, Reject)
    assert reject.reason is Reason.CONFLICT


# ---- commit


def test_a_commit_with_holes_ends_the_grant(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5, 9)))
    log = link.give(1, 1)
    name = (1).to_bytes(16, "big")
    reject = link.commit(1, log.commit_payload(DIGEST))
    assert reject == Reject(Reason.INCOMPLETE, name, failed=True)
    again = taker.link()
    assert again.session.on_header(again.data(1, BLOCK, first=1)) == Reject(
        Reason.WRONG_STATE, name
    )


def test_a_commit_over_other_frames_or_another_prompt_ends_the_grant(taker: Taker) -> None:
    for number, digest in ((1, b"other"), (2, DIGEST)):
        link = taker.link()
        taker.grants.open(grant(number, (number,)))
        payload = bytearray(link.give(number, 1).commit_payload(digest))
        payload[0] ^= number - 1  # the frame count of the second
        reject = link.commit(number, bytes(payload))
        assert isinstance(reject, Reject)
        assert reject.reason is Reason.DIGEST_DIFFERS


def test_a_commit_while_another_link_still_writes_is_refused(taker: Taker, link: Link) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    log = link.give(1, 1)
    again = link.session.on_header(link.data(1, BLOCK[:0] + bytes([1]) * 8))
    assert isinstance(again, Take)
    other = taker.link()
    assert other.commit(1, log.commit_payload(DIGEST)) == Reject(
        Reason.INCOMPLETE, entry.grant, failed=True
    )


def test_a_landed_grant_takes_neither_data_nor_commit(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    payload = link.give(1, 1).commit_payload(DIGEST)
    assert isinstance(link.commit(1, payload), Landed)
    name = (1).to_bytes(16, "big")
    assert link.commit(1, payload) == Reject(Reason.WRONG_STATE, name)
    other = taker.link()
    assert other.session.on_header(other.data(1, BLOCK)) == Reject(Reason.WRONG_STATE, name)


@pytest.mark.parametrize(
    "fields", [{"first": 1}, {"num_blocks": 1}, {"layer": 1}, {"part": 1}, {"length": 8}]
)
def test_a_commit_with_strange_fields_is_refused(
    taker: Taker, link: Link, fields: dict[str, int]
) -> None:
    taker.grants.open(grant(1, (5,)))
    payload = link.give(1, 1).commit_payload(DIGEST)
    assert isinstance(link.commit(1, payload, **fields), Reject)


def test_a_damaged_commit_closes_the_link_and_the_grant_lives_on(taker: Taker, link: Link) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    payload = link.give(1, 1).commit_payload(DIGEST)
    assert link.commit(1, payload, checksum=0) == Reject(Reason.BAD_CHECKSUM, entry.grant)
    assert isinstance(taker.link().commit(1, payload), Landed)


# ---- what happens between a header and its payload


def test_of_two_commits_under_way_one_lands(taker: Taker) -> None:
    """Both headers were judged before either payload had come."""
    taker.grants.open(grant(1, (5,)))
    one, other = taker.link(), taker.link()
    payload = one.give(1, 1).commit_payload(DIGEST)
    header = Header(
        type=FrameType.COMMIT, seq=0, grant=(1).to_bytes(16, "big"), length=len(payload)
    )
    checksum = payload_checksum(payload)
    first, second = (
        link.session.on_header(link.forge(header._replace(checksum=checksum)))
        for link in (one, other)
    )
    assert isinstance(first, Take)
    assert isinstance(second, Take)
    assert first.block_ids == ()
    other.session.on_lost(second)
    assert isinstance(one.session.on_payload(first, checksum, payload), Landed)
    third = other.session.on_header(other.forge(header._replace(checksum=checksum)))
    assert third == Reject(Reason.WRONG_STATE, header.grant)


def test_a_commit_that_is_judged_before_another_one_lands_comes_too_late(taker: Taker) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    link = taker.link()
    payload = link.give(1, 1).commit_payload(DIGEST)
    header = Header(
        type=FrameType.COMMIT,
        seq=0,
        grant=entry.grant,
        length=len(payload),
        checksum=payload_checksum(payload),
    )
    judged = link.session.on_header(link.forge(header))
    assert isinstance(judged, Take)
    entry.state = GrantState.COMMITTED
    result = link.session.on_payload(judged, header.checksum, payload)
    assert result == Reject(Reason.WRONG_STATE, entry.grant)


def test_a_late_frame_goes_to_no_block_and_may_break_off(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    taker.grants.revoke((1).to_bytes(16, "big"))
    judged = link.session.on_header(link.data(1, BLOCK))
    assert isinstance(judged, Take)
    assert (judged.block_ids, judged.store, judged.is_data) == ((), False, True)
    link.session.on_lost(judged)
    assert taker.written() == set()


@pytest.mark.parametrize("kind", [FrameType.DATA, FrameType.COMMIT])
def test_the_giver_takes_neither_data_nor_commit(link: Link, kind: FrameType) -> None:
    raw = link.session._out.pack(Header(type=kind, seq=link.session._out.seq))
    assert link.giver.on_header(raw) == Closed(Reason.BAD_FRAME, by_peer=False)


def test_the_giver_hears_how_much_of_the_ring_is_free(link: Link) -> None:
    assert link.giver.on_header(link.session.taken(1 << 40)) == Taken(1 << 40)


def test_a_probe_is_answered_when_it_came_whole(link: Link) -> None:
    name, payload = b"p" * 16, bytes(300)
    header = link.giver.probe(name, len(payload), payload_checksum(payload))
    assert link.arrive(header, payload) == Probed(name)
    assert link.giver.on_header(link.session.arrived(name)) == Acknowledged(name)
    header = link.giver.probe(name, len(payload), 1)
    assert link.arrive(header, payload) == Reject(Reason.BAD_CHECKSUM, name)


# ---- a taker that calls


def call(
    *,
    size: int = 4,
    stream: int = 2,
    expects: str = "p",
    key: bytes = KEY,
    giver_size: int = 4,
) -> tuple[object, object, GiverSession, TakerSession]:
    """What the giver and the taker think of it, and their sessions."""
    layouts = [
        KvLayout(num_layers=2, block_size=each, block_bytes=2 * each, shape="test")
        for each in (size, giver_size)
    ]
    mine = replace(identity("d", 2, layout=layouts[0]), stream=stream)
    taker = TakerSession(mine, GrantTable(), calls=Peer(expects))
    found = answering(taker.call(), identity("p", 1, layout=layouts[1], key=key))
    assert not isinstance(found, Reason)
    giver = GiverSession(found[1], found[0], taker.call())
    welcome = taker.on_hello(giver.hello())
    if not isinstance(welcome, bytes):
        return None, welcome, giver, taker
    proof = giver.on_welcome(welcome)
    if not isinstance(proof, bytes):
        return proof, None, giver, taker
    return "open", taker.on_proof(proof) or "open", giver, taker


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_taker_may_call_for_a_stream_and_a_size_of_blocks(size: int) -> None:
    here, there, giver, taker = call(size=size, stream=3)
    assert (here, there) == ("open", "open")
    assert (giver.place, giver.block_size) == (("d", 3), size)
    assert (taker.peer, taker.stream, taker.block_size) == ("p", 3, size)


def test_who_answers_a_call_must_be_the_one_that_was_called() -> None:
    assert call(expects="p-before")[1] is Reason.WRONG_INCARNATION
    assert call(key=b"x" * 32)[0] is Reason.WRONG_KEY
    taker = TakerSession(replace(identity("d", 2), stream=1), GrantTable(), calls=Peer("p"))
    assert taker.on_hello(identity("p", 1).hello(Step.HELLO)) is Reason.WRONG_INCARNATION


def test_a_size_that_is_no_part_of_the_givers_opens_no_link() -> None:
    assert call(size=8)[1] is Reason.WRONG_LAYOUT


def test_a_call_that_was_changed_on_its_way_opens_no_link() -> None:
    taker = TakerSession(identity("d", 2), GrantTable(), calls=Peer("p"))
    changed = bytearray(taker.call())
    changed[-1] ^= 1  # of the nonce, of which nobody makes use
    found = answering(bytes(changed), identity("p", 1))
    assert not isinstance(found, Reason)
    giver = GiverSession(found[1], found[0], bytes(changed))
    welcome = taker.on_hello(giver.hello())
    assert isinstance(welcome, bytes)
    assert giver.on_welcome(welcome) is Reason.WRONG_KEY


def test_what_is_no_call_is_not_answered() -> None:
    for damaged in (identity("d", 2).hello(Step.HELLO), bytes(codec.HELLO_BYTES)):
        assert not codec.is_call(damaged)
        assert answering(damaged, identity("p", 1)) is Reason.BAD_FRAME


def test_a_taker_that_called_fetches_and_no_other_does(link: Link) -> None:
    _, _, giver, taker = call()
    assert giver.on_header(taker.fetch(b"r" * 16)) == Fetched(b"r" * 16, 0)
    assert giver.on_header(taker.fetch(b"q" * 16, 4096)) == Fetched(b"q" * 16, 4096)
    raw = taker.fetch(b"q" * 16, codec.MAX_PAYLOAD_BYTES + 1)
    assert giver.on_header(raw) == Closed(Reason.BAD_LENGTH, by_peer=False)
    assert link.giver.on_header(link.session.fetch(b"r" * 16)) == Closed(
        Reason.BAD_FRAME, by_peer=False
    )
    assert link.session.on_header(link.forge(Header(FrameType.FETCH, 0))) == Reject(
        Reason.BAD_FRAME
    )


# ---- payloads beside the socket


@pytest.mark.parametrize("here", list(codec.Payloads))
@pytest.mark.parametrize("there", list(codec.Payloads))
def test_payloads_go_another_way_when_both_sides_say_the_same(
    here: codec.Payloads, there: codec.Payloads
) -> None:
    giver = GiverSession(replace(identity("p", 1), payloads=here), Peer("d"))
    taker = TakerSession(replace(identity("d", 2), payloads=there), GrantTable())
    assert shake(giver, taker) == ("open", "open")
    assert giver.payloads == taker.payloads == (here if here == there else codec.Payloads.SOCKET)


def test_only_the_taker_of_this_link_says_where_they_go(link: Link, taker: Taker) -> None:
    assert link.giver.on_landing(link.session.landing(b"there")) == b"there"
    assert link.giver.on_landing(taker.link().session.landing(b"there")) is Reason.BAD_MAC


# ---- a grant that will not be filled


def test_a_grant_that_is_open_fails_once_and_a_landed_one_never(taker: Taker, link: Link) -> None:
    first, second = grant(1, (5,)), grant(2, (6,))
    for entry in (first, second):
        taker.grants.open(entry)
    assert taker.grants.is_open(first.grant)
    assert taker.grants.fail(first.grant)
    assert not taker.grants.is_open(first.grant)
    assert not taker.grants.fail(first.grant)
    assert not taker.grants.fail(b"?" * 16)
    link.commit(2, link.give(2, 1).commit_payload(DIGEST))
    assert second.state is GrantState.COMMITTED
    assert not taker.grants.fail(second.grant)


# ---- blocks of other sizes


def giver_of(block_size: int) -> GiverSession:
    """It counts in blocks of so many tokens, of the same size each."""
    layout = KvLayout(num_layers=2, block_size=block_size, block_bytes=2 * block_size, shape="test")
    return GiverSession(identity("p", 1, layout=layout), Peer("d"))


def test_a_giver_may_count_in_parts_of_our_blocks() -> None:
    for size in (1, 2, 4):
        taker = TakerSession(identity("d", 2), GrantTable())
        assert shake(giver_of(size), taker) == ("open", "open")
        assert taker.block_size == size
    for size in (3, 8):
        taker = TakerSession(identity("d", 2), GrantTable())
        assert shake(giver_of(size), taker)[1] is Reason.WRONG_LAYOUT


def test_a_grant_is_used_in_the_blocks_it_was_made_for(taker: Taker) -> None:
    """A block number means another place in blocks of another size."""
    taker.grants.open(grant(1, (5,)))
    giver, session = giver_of(2), TakerSession(identity("d", 2), taker.grants)
    assert shake(giver, session) == ("open", "open")
    name = (1).to_bytes(16, "big")
    header = giver.data(name, 0, 0, 0, 1, 0)[1]
    assert session.on_header(header) == Reject(Reason.WRONG_LAYOUT, name)


# ---- what became of a COMMIT


def ask(link: Link, number: int, **fields: int) -> object:
    """RESUME, and what the taker makes of it."""
    name = number.to_bytes(16, "big")
    header = Header(type=FrameType.RESUME, seq=0, grant=name)
    return link.session.on_header(link.forge(header._replace(**fields)))


def test_a_giver_that_comes_back_learns_whether_its_commit_landed(taker: Taker) -> None:
    name = (1).to_bytes(16, "big")
    taker.grants.open(grant(1, (5,)))
    first = taker.link()
    payload = first.give(1, 1).commit_payload(DIGEST)
    assert ask(taker.link(), 1) == Asked(name, landed=False)
    assert isinstance(first.commit(1, payload), Landed)
    assert ask(taker.link(), 1) == Asked(name, landed=True)
    taker.grants.revoke(name)
    assert ask(taker.link(), 1) == Asked(name, landed=True)


def test_a_giver_that_comes_back_to_nothing_is_told_so(taker: Taker) -> None:
    for number in (1, 2, 3):
        taker.grants.open(grant(number, (number,), peer="q" if number == 3 else "p"))
    one, two, three, four = (number.to_bytes(16, "big") for number in (1, 2, 3, 4))
    taker.grants.revoke(one)
    assert ask(taker.link(), 1) == Late(one)
    assert isinstance(taker.link().commit(2, bytes(codec.COMMIT_BYTES)), Reject)
    assert ask(taker.link(), 2) == Reject(Reason.WRONG_STATE, two)
    assert ask(taker.link(), 3) == Reject(Reason.UNKNOWN_GRANT, three)
    taker.grants.revoke(three)
    assert ask(taker.link(), 3) == Reject(Reason.UNKNOWN_GRANT, three)
    assert ask(taker.link(), 4) == Reject(Reason.UNKNOWN_GRANT, four)


@pytest.mark.parametrize("field", ["first", "num_blocks", "layer", "part", "length"])
def test_a_question_with_strange_fields_is_refused(taker: Taker, field: str) -> None:
    taker.grants.open(grant(1, (5,)))
    assert isinstance(ask(taker.link(), 1, **{field: 1}), Reject)


def test_the_giver_hears_that_nothing_landed(link: Link) -> None:
    assert codec.unpack_header(link.giver.resume(b"g" * 16))[0].type == FrameType.RESUME
    assert link.giver.on_header(link.session.again(b"g" * 16)) == Again(b"g" * 16)


# ---- revoke


def test_frames_of_a_revoked_grant_are_sunk_and_the_link_lives(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    assert taker.grants.revoke((1).to_bytes(16, "big")) is True
    name = (1).to_bytes(16, "big")
    assert link.arrive(link.data(1, BLOCK), BLOCK) == Late(name)
    assert link.commit(1, bytes(codec.COMMIT_BYTES)) == Late(name)
    assert taker.written() == set()
    error = link.session.error(Reason.REVOKED, name)
    assert link.giver.on_header(error) == Refused(name, Reason.REVOKED)


def test_a_grant_revoked_in_mid_frame_is_released_by_the_frame(taker: Taker, link: Link) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    take = link.session.on_header(link.data(1, BLOCK))
    assert isinstance(take, Take)
    assert taker.grants.revoke(entry.grant) is False
    assert entry.state is GrantState.REVOKED
    link.session.leave(take)
    link.session.leave(take)
    assert entry.in_flight == 0
    assert not take.store
    assert link.session.on_payload(take, take.header.checksum) == Late(entry.grant)


def test_a_grant_revoked_before_its_last_byte_does_not_count_it(taker: Taker, link: Link) -> None:
    entry = grant(1, (5,))
    taker.grants.open(entry)
    take = link.session.on_header(link.data(1, BLOCK))
    assert isinstance(take, Take)
    taker.grants.revoke(entry.grant)
    assert link.session.on_payload(take, take.header.checksum) == Late(entry.grant)
    assert entry.in_flight == 0


def test_a_revoked_grant_of_another_peer_or_a_landed_one_is_unknown(taker: Taker) -> None:
    owner, other = taker.link(), taker.link("p2")
    taker.grants.open(grant(1, (5,)))
    taker.grants.open(grant(2, (6,)))
    assert isinstance(owner.commit(2, owner.give(2, 1).commit_payload(DIGEST)), Landed)
    for number in (1, 2):
        taker.grants.revoke(number.to_bytes(16, "big"))
    for link, number in ((other, 1), (owner, 2)):
        reject = link.session.on_header(link.data(number, BLOCK))
        assert reject == Reject(Reason.UNKNOWN_GRANT, number.to_bytes(16, "big"))


def test_late_frames_have_a_computed_length_and_an_end(taker: Taker, link: Link) -> None:
    taker.grants.open(grant(1, (5,)))
    name = (1).to_bytes(16, "big")
    taker.grants.revoke(name)
    other = taker.link()
    assert other.session.on_header(other.data(1, BLOCK, length=9)) == Reject(
        Reason.BAD_LENGTH, name
    )
    for _ in range(MAX_LATE_FRAMES):
        assert link.arrive(link.data(1, BLOCK), BLOCK) == Late(name)
    assert link.session.on_header(link.data(1, BLOCK)) == Reject(Reason.TOO_MANY_LATE, name)


def test_late_frames_of_many_grants_do_not_end_a_link_that_lives_long(
    taker: Taker, link: Link
) -> None:
    for number in range(1, MAX_LATE_FRAMES // 3):
        taker.grants.open(grant(number, (5,)))
        name = number.to_bytes(16, "big")
        taker.grants.revoke(name)
        for _ in range(4):
            assert link.arrive(link.data(number, BLOCK), BLOCK) == Late(name)


def test_revoked_grants_are_forgotten_in_the_end() -> None:
    grants = GrantTable()
    for number in range(MAX_REMEMBERED + 1):
        grants.open(grant(number, ()))
        assert grants.revoke(number.to_bytes(16, "big"))
    assert not grants.is_late((0).to_bytes(16, "big"), "p")
    assert grants.is_late((1).to_bytes(16, "big"), "p")
    assert len(grants) == 0


def test_a_grant_is_opened_once() -> None:
    grants = GrantTable()
    grants.open(grant(1, ()))
    with pytest.raises(ValueError, match="once"):
        grants.open(grant(1, ()))
    grants.revoke((1).to_bytes(16, "big"))
    with pytest.raises(ValueError, match="once"):
        grants.open(grant(1, ()))


# ---- the giver's ears


def test_the_giver_closes_on_anything_but_an_ack_or_an_error(link: Link) -> None:
    assert link.giver.on_header(bytes(64)) == Closed(Reason.BAD_FRAME, by_peer=False)
    assert link.giver.on_header(link.session.error(Reason.CONFLICT)) == Closed(
        Reason.CONFLICT, by_peer=True
    )
    assert link.giver.on_header(link.session.ack(b"g" * 16)) == Acknowledged(b"g" * 16)
    assert link.giver.on_header(link.data(1, BLOCK)) == Closed(Reason.BAD_SEQUENCE, by_peer=False)


def test_the_two_directions_have_keys_of_their_own(link: Link) -> None:
    assert link.giver.on_header(link.data(1, BLOCK)) == Closed(Reason.BAD_MAC, by_peer=False)


def test_the_link_keys_depend_on_both_nonces_and_on_the_cluster_key() -> None:
    hello = identity("p", 1).hello(codec.Step.HELLO)
    keys = {
        identity("p", 1, key=key).agreement(hello + welcome).giver_key
        for key in (KEY, b"x" * 32)
        for welcome in (
            identity("d", 2).hello(codec.Step.WELCOME),
            identity("d", 3).hello(codec.Step.WELCOME),
        )
    }
    assert len(keys) == 4


def test_a_frame_sent_twice_counts_once_for_the_commit() -> None:
    log = codec.FrameLog()
    header = Header(type=1, seq=0, num_blocks=1, length=8, checksum=3)
    log.sent(header)
    log.sent(header._replace(seq=1))
    assert log.num_bytes == 8
