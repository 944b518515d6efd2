"""Shared memory between two engines of one host: who gets it, what it can hold, and what a peer that lies about it can do."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.kv_pair import LAYOUT, NUM_BLOCKS, Pair, make_shared, make_tcp
from xllm_py.core.kv_memory import PARTS
from xllm_py.transport.base import KvEventKind
from xllm_py.transport.payload_ring import HOT_BYTES, RING_BYTES, TELL_BYTES
from xllm_py.transport.shm import RingReader, RingWriter
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.wire import codec


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def ends(sockets: tuple[socket.socket, socket.socket]) -> tuple[RingWriter, RingReader]:
    writer = RingWriter()
    writer.hand_over(sockets[0])
    return writer, RingReader(sockets[1])


def put(writer: RingWriter, data: bytes) -> None:
    with writer.place(len(data)) as room:
        room[:] = data
    writer.send()


@given(
    lengths=st.lists(
        st.integers(1, codec.MAX_PAYLOAD_BYTES) | st.integers(1, HOT_BYTES // 4),
        min_size=1,
        max_size=25,
    )
)
@settings(max_examples=60, deadline=None)
def test_payloads_come_out_as_they_went_in_however_they_wrap(lengths: list[int]) -> None:
    one, other = socket.socketpair()
    with one, other:
        writer, reader = ends((one, other))
        for number, length in enumerate(lengths):
            data = bytes([number + 1]) * length
            assert writer.has_room(length), "the reader is never more than a word behind"
            put(writer, data)
            with reader.take(length) as found:
                assert found == data
            news = reader.news()
            if news is not None:
                writer.taken(news)
        writer.close()
        reader.close()


def test_what_the_taker_has_not_taken_is_not_written_over(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    writer, reader = ends(sockets)
    size = RING_BYTES // 4
    for _ in range(4):
        assert writer.has_room(size)
        put(writer, bytes(size))
    assert not writer.has_room(1)
    reader.take(size).release()
    news = reader.news()
    assert news == size >= TELL_BYTES
    writer.taken(size)
    assert writer.has_room(size)
    writer.close()
    reader.close()


@pytest.mark.parametrize("total", [-1, 11])
def test_a_taker_that_counts_wrong_loses_the_link(
    sockets: tuple[socket.socket, socket.socket], total: int
) -> None:
    writer, reader = ends(sockets)
    put(writer, bytes(10))
    with pytest.raises(LinkBroken):
        writer.taken(total)
    writer.close()
    reader.close()


def test_the_reader_cannot_write_and_the_writer_cannot_shrink(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    writer = RingWriter()
    fd = os.dup(writer._fd)
    writer.hand_over(sockets[0])
    reader = RingReader(sockets[1])
    with pytest.raises(TypeError):
        reader._view[0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    os.close(fd)
    writer.close()
    reader.close()


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW])
@pytest.mark.parametrize("size", [4096, RING_BYTES])
def test_memory_that_can_change_its_size_is_refused(
    sockets: tuple[socket.socket, socket.socket], seals: int, size: int
) -> None:
    fd = os.memfd_create("ill", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    socket.send_fds(sockets[0], [b"R"], [fd])
    os.close(fd)
    with pytest.raises(LinkBroken):
        RingReader(sockets[1])


def test_a_peer_that_hands_nothing_over_is_refused(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sockets[0].sendall(b"R")
    with pytest.raises(LinkBroken):
        RingReader(sockets[1])


@pytest.mark.parametrize(("giver", "taker"), [(True, False), (False, True), (True, True)])
def test_both_sides_have_to_want_it(giver: bool, taker: bool) -> None:
    pair = Pair(
        lambda **made: make_tcp(
            shared_memory=taker if made["incarnation"] == "d-1" else giver, **made
        )
    )
    grant = pair.grant((10, 11))
    pair.give(grant, (1, 2))
    pair.given_event(KvEventKind.ACKNOWLEDGED, grant)
    pair.assert_copied((1, 2), (10, 11))
    (link,) = pair.taker._listener._links  # type: ignore[attr-defined]
    assert (link._sock.family == socket.AF_UNIX) == (giver and taker)
    pair.close()


def test_more_than_the_ring_holds_goes_through_it() -> None:
    pair = Pair(make_shared)
    rounds = RING_BYTES // (NUM_BLOCKS * LAYOUT.block_bytes * LAYOUT.num_layers * PARTS) + 2
    targets = tuple(range(NUM_BLOCKS))
    for _ in range(rounds):
        grant = pair.grant(targets)
        pair.give(grant, targets[::-1])
        pair.given_event(KvEventKind.ACKNOWLEDGED, grant)
        pair.taker.revoke(grant)
        pair.given.clear()
        pair.taken.clear()
    pair.assert_copied(targets[::-1], targets)
    pair.close()
