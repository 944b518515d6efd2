"""PULL over TCP against peers that misbehave: strangers that call, takers that leave, givers that are silent."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from tests.conformance.kv_pair import LAYOUT, Pair, make_memory, make_tcp
from tests.transport.fault_proxy import PASS, Fault, FaultProxy
from tests.transport.test_tcp import identity, read, until
from xllm_py.base.clock import RealClock
from xllm_py.transport import tcp_callers, tcp_socket
from xllm_py.transport.base import KvEventKind
from xllm_py.transport.kv_giving import MAX_PROBES
from xllm_py.transport.tcp_handshake import GiverEnd
from xllm_py.transport.tcp_socket import LinkBroken, split_endpoint
from xllm_py.wire import codec
from xllm_py.wire.kv_grants import GrantTable
from xllm_py.wire.kv_handshake import Peer, answering
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession

ACKNOWLEDGED, LANDED = KvEventKind.ACKNOWLEDGED, KvEventKind.LANDED
FAILED, RELEASED = KvEventKind.FAILED, KvEventKind.RELEASED


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(make_tcp, pull=True)
    yield made
    made.close()


class RawTaker:
    """A taker that knows the key, or not, calls a giver, and says what the test says."""

    def __init__(self, endpoint: str, *, name: str = "d-1", key: bytes | None = None) -> None:
        self.sock = socket.create_connection(split_endpoint(endpoint), 10.0)
        mine = identity(name)
        self.session = TakerSession(
            replace(mine, cluster_key=key or mine.cluster_key), GrantTable(), calls=Peer("p-1")
        )
        self.sock.sendall(self.session.call())
        welcome = self.session.on_hello(read(self.sock, codec.HELLO_BYTES))
        assert isinstance(welcome, bytes)
        self.sock.sendall(welcome)
        self.proof = read(self.sock, codec.PROOF_BYTES)
        if self.proof:
            assert self.session.on_proof(self.proof) is None

    def hung_up(self) -> bool:
        self.sock.settimeout(10.0)
        return self.sock.recv(1) == b""


class SilentGiver:
    """Shakes hands with everybody that calls, and says nothing more."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.socks: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            self.socks.append(sock)
            call = read(sock, codec.HELLO_BYTES)
            found = answering(call, identity("p-1"))
            assert isinstance(found, tuple)
            session = GiverSession(found[1], found[0], call)
            sock.sendall(session.hello())
            proof = session.on_welcome(read(sock, codec.HELLO_BYTES + codec.PROOF_BYTES))
            assert isinstance(proof, bytes)
            sock.sendall(proof)

    def close(self) -> None:
        self.server.close()
        for sock in self.socks:
            sock.close()


def land(pair: Pair, sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
    grant = pair.grant(targets)
    pair.give(grant, sources)
    pair.given_event(ACKNOWLEDGED, grant)
    pair.taken_event(LANDED, grant)
    pair.assert_copied(sources, targets)


def test_a_stranger_that_calls_gets_no_link_and_hears_no_proof(pair: Pair) -> None:
    stranger = RawTaker(pair.giver.endpoint, key=b"x" * 32)
    assert stranger.proof == b""
    until("the count", lambda: pair.giver.ledger()["frames_rejected"] == 1)
    until("the link's end", lambda: pair.giver.ledger()["links"] == 0)
    land(pair, (1, 2), (10, 11))
    stranger.sock.close()


def test_a_call_that_is_none_gets_nothing(pair: Pair) -> None:
    with socket.create_connection(split_endpoint(pair.giver.endpoint), 10.0) as sock:
        data = bytearray(identity("d-1").hello(codec.Step.CALL))
        data[0] ^= 1
        sock.sendall(data)
        assert read(sock, 1) == b""
    until("the count", lambda: pair.giver.ledger()["frames_rejected"] == 1)


def test_a_taker_that_calls_again_takes_its_own_place(pair: Pair) -> None:
    first = RawTaker(pair.giver.endpoint)
    until("a link", lambda: pair.giver.ledger()["links"] == 1)
    second = RawTaker(pair.giver.endpoint)
    assert first.hung_up()
    second.sock.sendall(second.session.fetch(b"p" * 16, 100))
    assert len(read(second.sock, codec.HEADER_BYTES + 100)) == codec.HEADER_BYTES + 100
    until("one link", lambda: pair.giver.ledger()["links"] == 1)
    land(pair, (1, 2), (10, 11))  # the real one takes the place of both
    assert second.hung_up()


def test_takers_that_call_and_leave_leave_nothing(pair: Pair) -> None:
    land(pair, (1, 2), (10, 11))
    before = (psutil.Process().num_fds(), threading.active_count())
    for number in range(20):
        RawTaker(pair.giver.endpoint, name=f"d-{number + 5}").sock.close()
    pair.giver.poll()
    until("the links to end", lambda: pair.giver.ledger()["links"] == 1)
    land(pair, (3, 4), (12, 13))  # what ended is swept up when there is something to do
    until(
        "nothing",
        lambda: psutil.Process().num_fds() <= before[0] and threading.active_count() <= before[1],
    )


def test_a_taker_cannot_have_probes_pile_up(pair: Pair) -> None:
    greedy = RawTaker(pair.giver.endpoint)
    size = codec.MAX_PAYLOAD_BYTES
    for number in range(40 * MAX_PROBES):
        try:
            greedy.sock.sendall(greedy.session.fetch(number.to_bytes(16, "big"), size))
        except OSError:
            break
    until("the link to end", lambda: pair.giver.ledger()["links"] == 0)
    greedy.sock.close()
    land(pair, (1, 2), (10, 11))


def test_a_taker_that_is_promised_something_and_never_calls_has_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_callers, "PATIENCE_S", 0.2)
    pair.give(b"g" * 16, (1, 2))
    assert "does not fetch" in pair.given_event(FAILED, b"g" * 16).text
    assert pair.giver.ledger()["grants_given"] == 0


def test_a_giver_that_computes_for_long_is_not_taken_for_dead(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_socket, "STALL_S", 0.1)
    grant = pair.grant((10, 11))
    pair.connect(grant)
    for _ in range(20):
        pair.turn(0.1)
    pair.push(grant, (1, 2))
    pair.giver.commit(grant)
    pair.taken_event(LANDED, grant)
    assert pair.giver.ledger()["links_broken"] == 0


def test_a_giver_that_is_silent_fails_what_waits_for_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_socket, "STALL_S", 0.1)
    silent = SilentGiver()
    pair.way = silent.endpoint
    grant = pair.grant((10, 11))
    assert "silent" in pair.taken_event(FAILED, grant).text
    assert len(silent.socks) > 1
    silent.close()


def test_a_giver_hears_over_the_next_link_what_nobody_waits_for_any_more(pair: Pair) -> None:
    """It does not know that the last one is lost, so what it holds would wait for ever."""
    with contextlib.closing(FaultProxy(pair.giver.endpoint, lambda _: PASS, called=True)) as proxy:
        pair.way = proxy.endpoint
        land(pair, (1, 2), (14, 15))
        lost = pair.grant((10, 11))
        pair.connect(lost)
        proxy.plan = lambda _: Fault("reset")
        proxy.cut()
        pair.taken_event(FAILED, lost)
        pair.taker.revoke(lost)
        pair.taken_event(RELEASED, lost)
        pair.push(lost, (1, 2))
        pair.giver.commit(lost)
        proxy.plan = lambda _: PASS
        land(pair, (3, 4), (12, 13))
        assert codec.TEXTS[codec.Reason.REVOKED] in pair.given_event(FAILED, lost).text
        assert pair.giver.ledger()["grants_given"] == 0
        pair.assert_untouched(but=(12, 13, 14, 15))


def test_closing_waits_for_nobody(pair: Pair) -> None:
    silent = SilentGiver()
    pair.way = silent.endpoint
    pair.grant((10, 11))
    pair.connect(b"g" * 16)
    pair.turn(0.05)
    pair.taker.close()
    pair.giver.close()
    silent.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


def test_a_layout_of_the_takers_that_is_none_of_ours_is_refused(pair: Pair) -> None:
    other = replace(LAYOUT, shape="another dtype")
    stranger = pair.add(memory=make_memory(None, other), incarnation="d-3")
    assert stranger.endpoint
    taker = TakerSession(identity("d-3", other), GrantTable(), calls=Peer("p-1"))
    with socket.create_connection(split_endpoint(pair.giver.endpoint), 10.0) as sock:
        sock.sendall(taker.call())
        assert taker.on_hello(read(sock, codec.HELLO_BYTES)) is codec.Reason.WRONG_LAYOUT


def test_a_connection_that_is_not_wanted_any_more_is_closed() -> None:
    ours, theirs = socket.socketpair()
    session = GiverSession(identity("p-1"), Peer("d-1"), b"call")
    callers = tcp_callers.Callers(RealClock())
    callers.put(GiverEnd(ours, session, None))

    def closing(_sock: socket.socket) -> None:
        raise LinkBroken("closed")

    with pytest.raises(LinkBroken):
        callers.take(("d-1", 0), closing, lambda _wait_s: True)
    assert theirs.recv(1) == b""
    theirs.close()
    callers.close()
