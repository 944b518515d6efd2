"""What a link sends again after it broke."""

from __future__ import annotations

import dataclasses

from xllm_py.transport.base import GiverGrant
from xllm_py.transport.kv_giving import MAX_EARLY, MAX_PROBES, MAX_TRIES, Givings, Item
from xllm_py.wire.codec import FrameType

A, B = b"a" * 16, b"b" * 16
DATA, COMMIT, RESUME = FrameType.DATA, FrameType.COMMIT, FrameType.RESUME


def grant(name: bytes) -> GiverGrant:
    return GiverGrant(
        grant=name, endpoints=(), peer_incarnation="d", block_size=4, prompt_digest=b""
    )


def givings(*names: bytes) -> Givings:
    made = Givings()
    for name in names:
        made.add(grant(name))
    return made


def block(name: bytes, number: int) -> Item:
    return Item(DATA, name, 0, 0, number, (number,))


def commit(name: bytes) -> Item:
    return Item(COMMIT, name)


def send(made: Givings, count: int) -> list[Item]:
    """As the link does it."""
    sent = []
    for _ in range(count):
        found = made.next()
        assert found is not None
        giving, item = found
        if item.kind is not DATA:
            giving.committed_s = 1.0
        sent.append(item)
    return sent


def rest(made: Givings) -> list[Item]:
    items = []
    while (found := made.next()) is not None:
        items.append(found[1])
    return items


def test_what_was_sent_goes_first_and_in_its_order() -> None:
    made = givings(A, B)
    made.put([block(A, 0), block(B, 0), block(A, 1), block(B, 1), commit(A)], 1.0)
    send(made, 3)
    assert made.reopened() == []
    again = rest(made)
    assert [item for item in again if item.grant == A] == [block(A, 0), block(A, 1), commit(A)]
    assert [item for item in again if item.grant == B] == [block(B, 0), block(B, 1)]


def test_a_commit_that_left_is_asked_for_before_anything_is_sent_again() -> None:
    made = givings(A)
    made.put([block(A, 0), commit(A)], 1.0)
    send(made, 2)
    made.reopened()
    assert send(made, 1) == [Item(RESUME, A)]
    assert made.next() is None
    made.reopened()  # the question was lost too: it is put once
    assert send(made, 1) == [Item(RESUME, A)]
    made.again(A)
    assert rest(made) == [block(A, 0), commit(A)]


def test_an_answer_to_no_question_changes_nothing() -> None:
    made = givings(A)
    made.put([block(A, 0)], 1.0)
    send(made, 1)
    made.again(A)
    made.again(B)
    assert made.next() is None


def test_a_grant_sees_only_so_many_links_break() -> None:
    made = givings(A)
    made.put([block(A, 0)], 1.0)
    for _ in range(MAX_TRIES - 1):
        send(made, 1)
        assert made.reopened() == []
    made.add(grant(B))
    assert made.reopened() == [A]
    assert A not in made
    assert B in made
    assert made.next() is None


def test_frames_of_a_dropped_grant_are_gone() -> None:
    made = givings(A, B)
    made.put([block(A, 0), block(B, 0)], 1.0)
    made.drop(A)
    made.put([block(A, 1)], 1.0)
    assert rest(made) == [block(B, 0)]
    assert made.clear() == [B]
    assert len(made) == 0


# ---- fetched


def fetched(name: bytes) -> GiverGrant:
    return dataclasses.replace(grant(name), read_grant=b"r" + name[1:])


def test_what_the_peer_fetches_waits_until_it_asks() -> None:
    made = Givings()
    made.add(fetched(A))
    made.put([block(A, 0), commit(A)], 1.0)
    assert made.next() is None
    made.fetch(b"r" + B[1:])
    assert made.next() is None
    made.fetch(b"r" + A[1:])
    made.put([block(A, 1)], 1.0)
    assert rest(made) == [block(A, 0), commit(A), block(A, 1)]


def test_it_may_ask_before_the_grant_is_known() -> None:
    made = Givings()
    made.fetch(b"r" + A[1:])
    made.add(fetched(A))
    made.put([block(A, 0)], 1.0)
    assert rest(made) == [block(A, 0)]


def test_only_so_many_early_questions_are_remembered() -> None:
    made = Givings()
    made.fetch(b"r" + A[1:])
    for number in range(MAX_EARLY):
        made.fetch(number.to_bytes(16, "big"))
    made.add(fetched(A))
    made.put([block(A, 0)], 1.0)
    assert made.next() is None


def test_over_a_new_link_it_has_to_ask_again_and_a_commit_that_had_left_is_asked_for_at_once() -> (
    None
):
    made = Givings()
    for name in (A, B):
        made.add(fetched(name))
        made.fetch(b"r" + name[1:])
    made.put([block(A, 0), block(A, 1), block(B, 0), commit(B)], 1.0)
    assert send(made, 1) == [block(A, 0)]
    made.reopened()
    assert made.next() is None
    made.fetch(b"r" + A[1:])
    assert rest(made) == [block(A, 0), block(A, 1)]
    made.fetch(b"r" + B[1:])
    send(made, 2)
    made.reopened()
    assert send(made, 1) == [Item(RESUME, B)]
    made.again(B)
    assert made.next() is None
    made.fetch(b"r" + B[1:])
    assert rest(made) == [block(B, 0), commit(B)]


def test_a_probe_that_is_fetched_lives_as_long_as_its_frame() -> None:
    made = Givings()
    assert all(made.fetch_probe(number.to_bytes(16, "big"), 9) for number in range(MAX_PROBES))
    assert not made.fetch_probe(A, 9)
    found = made.next()
    assert found is not None
    assert (found[0].probe_bytes, found[1].kind) == (9, FrameType.PROBE)
    made.reopened()
    assert made.next() is None
    assert len(made) == 0
