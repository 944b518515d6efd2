"""KV over TCP against peers that misbehave on the socket: silent, slow, half-dead, nonsense, too many."""

from __future__ import annotations

import errno
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.conformance.kv_pair import (
    CANARY,
    DIGEST,
    KEY,
    LAYOUT,
    NUM_BLOCKS,
    Pair,
    make_memory,
    make_tcp,
)
from xllm_py.base.clock import HandClock
from xllm_py.base.errors import LayoutMismatch, PortInUse, UsageError
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.transport import stage
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.transport.tcp_giver import ACK_S
from xllm_py.transport.tcp_listener import MAX_HANDSHAKES
from xllm_py.transport.tcp_socket import split_endpoint, tune
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_grants import GrantTable
from xllm_py.wire.kv_handshake import Identity, Peer
from xllm_py.wire.kv_session import GiverSession
from xllm_py.wire.kv_taker import TakerSession

DEADLINE_S = 10.0
GRANT = b"g" * 16


def until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        select.select([], [], [], 0.005)


def wait_for(transport: TcpKvTransport, kind: KvEventKind) -> KvEvent:
    found: list[KvEvent] = []

    def seen() -> bool:
        found.extend(event for event in transport.poll() if event.kind is kind)
        return bool(found)

    until(str(kind), seen)
    return found[0]


def identity(name: str, layout: KvLayout = LAYOUT) -> Identity:
    nonce = bytes(codec.NONCE_BYTES)
    return Identity(incarnation=name, layout=layout, cluster_key=KEY, nonce=nonce)


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            break
        data += part
    return data


class RawGiver:
    """A giver that knows the key and sends what the test says."""

    def __init__(self, endpoint: str) -> None:
        self.sock = socket.create_connection(split_endpoint(endpoint), DEADLINE_S)
        self.session = GiverSession(identity("p-1"), Peer("d-1"))
        self.sock.sendall(self.session.hello())
        proof = self.session.on_welcome(read(self.sock, kv_session.WELCOME_BYTES))
        assert isinstance(proof, bytes)
        self.sock.sendall(proof)

    def frame(self, payload: bytes, *, layer: int = 0, part: int = 0, first: int = 0) -> bytes:
        count = len(payload) // LAYOUT.block_bytes
        return (
            self.session.data(GRANT, layer, part, first, count, payload_checksum(payload))[1]
            + payload
        )

    def answer(self) -> object:
        return self.session.on_header(read(self.sock, codec.HEADER_BYTES))


@pytest.fixture
def memory() -> KvMemory:
    return make_memory(None)


@pytest.fixture
def taker(memory: KvMemory) -> Iterator[TcpKvTransport]:
    transport = TcpKvTransport(memory=memory, incarnation="d-1", cluster_key=KEY)
    transport.open_grant(
        TakerGrant(
            grant=GRANT,
            peer_incarnation="p-1",
            block_size=4,
            block_ids=(4, 9),
            first_wanted=0,
            prompt_digest=DIGEST,
        )
    )
    yield transport
    transport.close()


@pytest.fixture
def giver(taker: TcpKvTransport) -> Iterator[RawGiver]:
    made = RawGiver(taker.endpoint)
    yield made
    made.sock.close()


def payload_of(num_blocks: int) -> bytes:
    return bytes(range(96)) * num_blocks


def untouched(memory: KvMemory, but: tuple[int, ...] = ()) -> bool:
    clean = bytes([CANARY]) * LAYOUT.block_bytes
    return all(
        memory.span(layer, part, block) == clean
        for layer in range(LAYOUT.num_layers)
        for part in range(PARTS)
        for block in set(range(NUM_BLOCKS)) - set(but)
    )


# ---- the taker


def test_a_frame_that_comes_byte_by_byte_is_written(
    taker: TcpKvTransport, giver: RawGiver, memory: KvMemory
) -> None:
    giver.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in giver.frame(payload_of(2)):
        giver.sock.sendall(bytes([byte]))
    until("the frame", lambda: taker.ledger()["bytes_received"] == 2 * LAYOUT.block_bytes)
    assert bytes(memory.span(0, 0, 4)) == bytes(range(96))
    assert bytes(memory.span(0, 0, 9)) == bytes(range(96))
    assert untouched(memory, but=(4, 9))


def test_a_grant_revoked_in_mid_frame_gets_no_byte_more(
    taker: TcpKvTransport, giver: RawGiver, memory: KvMemory
) -> None:
    frame = giver.frame(payload_of(2))
    giver.sock.sendall(frame[:80])
    until("the first bytes", lambda: bytes(memory.span(0, 0, 4, 1)[:16]) == bytes(range(16)))
    taker.revoke(GRANT)
    wait_for(taker, KvEventKind.RELEASED)
    for block in (4, 9):
        memory.span(0, 0, block)[:] = bytes([CANARY]) * LAYOUT.block_bytes
    giver.sock.sendall(frame[80:])
    assert giver.answer() == kv_session.Refused(GRANT, Reason.REVOKED)
    assert untouched(memory)
    assert taker.poll() == []


def test_a_staged_frame_of_a_grant_revoked_meanwhile_writes_nothing(
    taker: TcpKvTransport, giver: RawGiver, memory: KvMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "MIN_PIECES", 1)
    giver.sock.sendall(giver.frame(payload_of(2)))
    until("a whole frame", lambda: bytes(memory.span(0, 0, 9)) == payload_of(1))
    frame = giver.frame(payload_of(2), part=1)
    giver.sock.sendall(frame[:-1])
    taker.revoke(GRANT)
    wait_for(taker, KvEventKind.RELEASED)
    giver.sock.sendall(frame[-1:])
    assert giver.answer() == kv_session.Refused(GRANT, Reason.REVOKED)
    clean = bytes([CANARY]) * LAYOUT.block_bytes
    assert all(memory.span(0, 1, block) == clean for block in range(NUM_BLOCKS))


def test_a_grant_revoked_in_mid_frame_is_released_once_though_the_link_breaks_then(
    taker: TcpKvTransport, giver: RawGiver, memory: KvMemory
) -> None:
    giver.sock.sendall(giver.frame(payload_of(2))[:80])
    until("the first bytes", lambda: bytes(memory.span(0, 0, 4, 1)[:16]) == bytes(range(16)))
    taker.revoke(GRANT)
    wait_for(taker, KvEventKind.RELEASED)
    giver.sock.close()
    until("the end of the link", lambda: taker.ledger()["links"] == 0)
    assert taker.poll() == []


def test_a_giver_that_stops_in_mid_frame_loses_its_link_and_its_grant(
    taker: TcpKvTransport, giver: RawGiver
) -> None:
    giver.sock.sendall(giver.frame(payload_of(2))[:100])
    assert "middle of a frame" in wait_for(taker, KvEventKind.FAILED).text
    taker.revoke(GRANT)
    assert wait_for(taker, KvEventKind.RELEASED).grant == GRANT
    until("the end of the link", lambda: taker.ledger()["links"] == 0)


def test_a_giver_that_stops_in_mid_header_loses_its_link(
    taker: TcpKvTransport, giver: RawGiver
) -> None:
    giver.sock.sendall(giver.frame(payload_of(1))[:10])
    assert read(giver.sock, 1) == b""
    until("the end of the link", lambda: taker.ledger()["links"] == 0)


def test_an_idle_link_stays(taker: TcpKvTransport, giver: RawGiver) -> None:
    until("the link", lambda: taker.ledger()["links"] == 1)
    select.select([giver.sock], [], [], 1.5)
    giver.sock.sendall(giver.frame(payload_of(1)))
    until("the frame", lambda: taker.ledger()["bytes_received"] > 0)


def test_a_damaged_payload_is_answered_with_the_reason(
    taker: TcpKvTransport, giver: RawGiver, memory: KvMemory
) -> None:
    frame = bytearray(giver.frame(payload_of(1)))
    frame[-1] ^= 1
    giver.sock.sendall(frame)
    assert giver.answer() == kv_session.Closed(Reason.BAD_CHECKSUM, True, GRANT)
    assert read(giver.sock, 1) == b""
    assert "checksum" in wait_for(taker, KvEventKind.FAILED).text
    assert untouched(memory, but=(4,))


def test_a_rejected_giver_that_still_sends_is_not_reset(
    taker: TcpKvTransport, giver: RawGiver
) -> None:
    """A reset would overtake our answer on some systems."""
    frame = bytearray(giver.frame(payload_of(1)))
    frame[-1] ^= 1
    giver.sock.sendall(bytes(frame) + bytes(100_000))
    assert giver.answer() == kv_session.Closed(Reason.BAD_CHECKSUM, True, GRANT)
    assert read(giver.sock, 1) == b""
    giver.sock.close()
    until("the end of the link", lambda: taker.ledger()["links"] == 0)


def test_a_replayed_frame_is_answered_with_the_reason(
    taker: TcpKvTransport, giver: RawGiver
) -> None:
    frame = giver.frame(payload_of(1))
    giver.sock.sendall(frame + frame)
    assert giver.answer() == kv_session.Closed(Reason.BAD_SEQUENCE, by_peer=True)
    assert taker.ledger()["frames_rejected"] == 1


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".ljust(200), b"\x16\x03\x01" + bytes(200), bytes(4096)],
    ids=["http", "tls", "zeros"],
)
def test_nonsense_on_the_port_is_closed(taker: TcpKvTransport, garbage: bytes) -> None:
    with socket.create_connection(split_endpoint(taker.endpoint), DEADLINE_S) as sock:
        sock.sendall(garbage)
        try:
            assert read(sock, 1) == b""
        except OSError as error:
            assert error.errno == errno.ECONNRESET
    until("the end of the link", lambda: taker.ledger()["links"] == 0)


def test_a_stranger_that_says_nothing_is_closed_after_the_handshake_time(
    taker: TcpKvTransport,
) -> None:
    with socket.create_connection(split_endpoint(taker.endpoint), DEADLINE_S) as sock:
        sock.sendall(b"XKH1")
        assert read(sock, 1) == b""
    until("the end of the link", lambda: taker.ledger()["links"] == 0)


def test_strangers_are_limited_and_known_peers_are_not_shut_out_for_ever(
    taker: TcpKvTransport, giver: RawGiver
) -> None:
    where = split_endpoint(taker.endpoint)
    strangers = [socket.create_connection(where, DEADLINE_S) for _ in range(MAX_HANDSHAKES)]
    until("all strangers", lambda: taker.ledger()["links"] == MAX_HANDSHAKES + 1)
    with socket.create_connection(where, DEADLINE_S) as one_more:
        assert read(one_more, 1) == b""
    assert taker.ledger()["links"] == MAX_HANDSHAKES + 1
    giver.sock.sendall(giver.frame(payload_of(1)))
    until("the frame", lambda: taker.ledger()["bytes_received"] > 0)
    for stranger in strangers:
        stranger.close()
    until("the strangers' end", lambda: taker.ledger()["links"] == 1)
    RawGiver(taker.endpoint).sock.close()


def test_blocks_outside_the_cache_are_never_granted(taker: TcpKvTransport) -> None:
    with pytest.raises(IndexError):
        taker.open_grant(
            TakerGrant(
                grant=b"x" * 16,
                peer_incarnation="p-1",
                block_size=4,
                block_ids=(NUM_BLOCKS,),
                first_wanted=0,
                prompt_digest=DIGEST,
            )
        )


# ---- the giver


BIG = KvLayout(num_layers=1, block_size=4, block_bytes=4 << 20, shape="big")


class RawTaker:
    """A taker that knows the key, shakes hands once, and then reads only what the test reads."""

    def __init__(self, layout: KvLayout) -> None:
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.session = TakerSession(identity("d-1", layout), GrantTable())

    def accept(self) -> socket.socket:
        self._server.settimeout(DEADLINE_S)
        sock, _ = self._server.accept()
        self._server.close()
        welcome = self.session.on_hello(read(sock, codec.HELLO_BYTES))
        assert isinstance(welcome, bytes)
        sock.sendall(welcome)
        assert self.session.on_proof(read(sock, codec.PROOF_BYTES)) is None
        return sock

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def raw_taker() -> Iterator[RawTaker]:
    made = RawTaker(BIG)
    yield made
    made.close()


@pytest.fixture
def big_giver(raw_taker: RawTaker) -> Iterator[TcpKvTransport]:
    memory = make_memory(1, BIG, 4)
    transport = TcpKvTransport(memory=memory, incarnation="p-1", cluster_key=KEY, listen=False)
    transport.connect(
        GiverGrant(
            grant=GRANT,
            endpoints=(raw_taker.endpoint,),
            peer_incarnation="d-1",
            block_size=4,
            prompt_digest=DIGEST,
        )
    )
    yield transport
    transport.close()


def until_still(read_count: Callable[[], int]) -> None:
    """Until a count has not changed for a tenth of a second."""
    seen, since = read_count(), time.monotonic()

    def still() -> bool:
        nonlocal seen, since
        now = read_count()
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.1

    until("a pause", still)


def test_abandon_does_not_wait_for_a_peer_that_reads_slowly(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    """The rest of what is in flight goes out from a copy: every frame holds what the blocks held at `abandon`."""
    with raw_taker.accept() as sock:
        big_giver.push(GRANT, 0, 0, (0, 1, 2, 3))
        until_still(lambda: big_giver.ledger()["bytes_sent"])
        big_giver.abandon(GRANT)
        for block in range(4):
            for part in range(PARTS):
                big_giver._memory.span(0, part, block)[:] = bytes(BIG.block_bytes)
        sock.settimeout(0.5)
        frames = 0
        try:
            while True:
                header = codec.unpack_header(read(sock, codec.HEADER_BYTES))[0]
                assert payload_checksum(read(sock, header.length)) == header.checksum
                frames += 1
        except TimeoutError:
            assert 1 <= frames < 8


def test_a_giver_in_mid_frame_hears_why_it_is_refused(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    sock = raw_taker.accept()
    big_giver.push(GRANT, 0, 0, (0, 1, 2, 3))
    until_still(lambda: big_giver.ledger()["bytes_sent"])
    sock.sendall(raw_taker.session.error(Reason.CONFLICT, GRANT))
    sock.close()
    text = wait_for(big_giver, KvEventKind.FAILED).text
    assert codec.TEXTS[Reason.CONFLICT] in text


def test_a_peer_that_takes_no_bytes_fails_the_grant(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    with raw_taker.accept():
        for _ in range(4):
            big_giver.push(GRANT, 0, 0, (0, 1, 2, 3))
        assert wait_for(big_giver, KvEventKind.FAILED).grant == GRANT
    assert big_giver.ledger()["failures"] == 1


def test_an_answer_to_no_commit_fails_the_link(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    with raw_taker.accept() as sock:
        sock.sendall(raw_taker.session.ack(GRANT))
        assert "no COMMIT" in wait_for(big_giver, KvEventKind.FAILED).text


def test_half_an_answer_fails_the_link(raw_taker: RawTaker, big_giver: TcpKvTransport) -> None:
    with raw_taker.accept() as sock:
        sock.sendall(raw_taker.session.ack(GRANT)[:30])
        assert "half an answer" in wait_for(big_giver, KvEventKind.FAILED).text


def test_an_unsigned_answer_fails_the_link(raw_taker: RawTaker, big_giver: TcpKvTransport) -> None:
    with raw_taker.accept() as sock:
        sock.sendall(bytes(codec.HEADER_BYTES))
        wait_for(big_giver, KvEventKind.FAILED)


def test_a_peer_that_accepts_and_says_nothing_fails_the_grant(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    assert "handshake" in wait_for(big_giver, KvEventKind.FAILED).text


def test_an_endpoint_without_a_port_fails_the_grant(big_giver: TcpKvTransport) -> None:
    other = b"o" * 16
    big_giver.connect(
        GiverGrant(
            grant=other,
            endpoints=("nowhere",),
            peer_incarnation="d-1",
            block_size=4,
            prompt_digest=DIGEST,
        )
    )
    assert "host:port" in wait_for(big_giver, KvEventKind.FAILED).text


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:99999", "127.0.0.1:\N{SUPERSCRIPT TWO}", "a..b:1", "h" * 70 + ":1"],
)
def test_an_endpoint_that_can_be_nobodys_fails_the_grant(
    big_giver: TcpKvTransport, endpoint: str
) -> None:
    other = b"o" * 16
    big_giver.connect(
        GiverGrant(
            grant=other,
            endpoints=(endpoint,),
            peer_incarnation="d-1",
            block_size=4,
            prompt_digest=DIGEST,
        )
    )
    assert "host:port" in wait_for(big_giver, KvEventKind.FAILED).text


def test_a_link_that_cannot_be_made_for_want_of_descriptors_fails_its_grant(
    big_giver: TcpKvTransport, raw_taker: RawTaker
) -> None:
    raw_taker.accept().close()
    wait_for(big_giver, KvEventKind.FAILED)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1, hard))
        try:
            big_giver.connect(
                GiverGrant(
                    grant=b"o" * 16,
                    endpoints=(raw_taker.endpoint,),
                    peer_incarnation="d-1",
                    block_size=4,
                    prompt_digest=DIGEST,
                )
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert wait_for(big_giver, KvEventKind.FAILED).grant == b"o" * 16
    assert big_giver.ledger()["grants_given"] == 0


def test_a_failed_link_gives_its_descriptors_back(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    with raw_taker.accept():
        open_link = psutil.Process().num_fds()
    wait_for(big_giver, KvEventKind.FAILED)
    # both sockets of the link, and the two ends of the giver's wake
    assert psutil.Process().num_fds() == open_link - 4


def test_a_dead_host_is_noticed_though_nothing_is_sent(taker: TcpKvTransport) -> None:
    with socket.socket() as sock:
        tune(sock)
        idle, every, times = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
    assert idle + every * times <= 60


def test_a_taker_that_gets_no_thread_turns_the_peer_away_and_goes_on(
    taker: TcpKvTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def no_taker(thread: threading.Thread) -> None:
        if thread.name == "kv-taker":
            raise RuntimeError("can't start new thread")
        start(thread)

    where = split_endpoint(taker.endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_taker)
        with socket.create_connection(where, DEADLINE_S) as sock:
            assert read(sock, 1) == b""
    assert taker.ledger()["links"] == 0
    RawGiver(taker.endpoint).sock.close()


HALF_MIB = KvLayout(num_layers=1, block_size=4, block_bytes=512 << 10, shape="half a MiB")


class Committed:
    """A giver with a hand-turned clock that has committed a MiB, and a taker that has read nothing of it."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.taker = RawTaker(HALF_MIB)
        memory = make_memory(1, HALF_MIB, 2)
        self.giver = TcpKvTransport(
            memory=memory, incarnation="p-1", cluster_key=KEY, listen=False, clock=self.clock
        )
        self.connect(GRANT)
        self.giver.push(GRANT, 0, 0, (0,))
        self.giver.commit(GRANT)
        self.sock = self.taker.accept()

    def connect(self, grant: bytes) -> None:
        endpoint = self.taker.endpoint
        self.giver.connect(
            GiverGrant(
                grant=grant,
                endpoints=(endpoint,),
                peer_incarnation="d-1",
                block_size=4,
                prompt_digest=DIGEST,
            )
        )

    def read_until_commit(self) -> None:
        header = codec.unpack_header(read(self.sock, codec.HEADER_BYTES))[0]
        while header.type != codec.FrameType.COMMIT:
            read(self.sock, header.length)
            header = codec.unpack_header(read(self.sock, codec.HEADER_BYTES))[0]
        read(self.sock, header.length)

    def close(self) -> None:
        self.giver.close()
        self.sock.close()
        self.taker.close()


@pytest.fixture
def committed() -> Iterator[Committed]:
    made = Committed()
    yield made
    made.close()


def test_a_commit_without_an_answer_fails_the_grant(committed: Committed) -> None:
    committed.read_until_commit()
    committed.clock.turn(ACK_S + 1)
    assert "no answer" in wait_for(committed.giver, KvEventKind.FAILED).text


def test_a_commit_that_is_still_under_way_on_a_slow_link_is_waited_for(
    committed: Committed,
) -> None:
    """The kernel had taken it at once; the answer counts from when the peer's kernel has it."""
    (link,) = committed.giver._links.values()

    def at_rest() -> bool:
        with link._state:
            return not link._givings._queue and not link._reading

    until("the kernel", at_rest)
    committed.clock.turn(ACK_S + 1)
    other = b"o" * 16
    committed.connect(other)
    committed.giver.commit(other)  # the link's thread looks at its clock
    committed.read_until_commit()
    committed.read_until_commit()
    for grant in (GRANT, other):
        committed.sock.sendall(committed.taker.session.ack(grant))
    events: list[KvEvent] = []

    def both() -> bool:
        events.extend(committed.giver.poll())
        return len(events) == 2

    until("both answers", both)
    assert {event.kind for event in events} == {KvEventKind.ACKNOWLEDGED}


def test_closing_does_not_wait_for_a_peer_in_mid_frame(
    raw_taker: RawTaker, big_giver: TcpKvTransport
) -> None:
    with raw_taker.accept():
        big_giver.push(GRANT, 0, 0, (0, 1, 2, 3))
        big_giver.close()
    assert not any(thread.name == "kv-giver" for thread in threading.enumerate())


def test_blocks_outside_the_cache_are_never_pushed(big_giver: TcpKvTransport) -> None:
    with pytest.raises(IndexError):
        big_giver.push(GRANT, 0, 0, (4,))
    with pytest.raises(IndexError):
        big_giver.push(GRANT, 1, 0, (0,))


# ---- start


def test_a_busy_port_is_an_error_or_moves_on(taker: TcpKvTransport, memory: KvMemory) -> None:
    port = split_endpoint(taker.endpoint)[1]
    descriptors = psutil.Process().num_fds()
    with pytest.raises(PortInUse, match="transfer_listen_port"):
        TcpKvTransport(memory=memory, incarnation="d-2", cluster_key=KEY, port=port)
    assert psutil.Process().num_fds() == descriptors
    moved = TcpKvTransport(
        memory=memory, incarnation="d-2", cluster_key=KEY, port=port, port_may_move=True
    )
    assert split_endpoint(moved.endpoint)[1] > port
    moved.close()


def test_a_missing_key_and_a_block_larger_than_a_frame_are_start_errors(memory: KvMemory) -> None:
    with pytest.raises(UsageError, match="cluster key"):
        TcpKvTransport(memory=memory, incarnation="d", cluster_key=b"")
    huge = KvLayout(num_layers=1, block_size=1, block_bytes=(4 << 20) + 1, shape="huge")
    with pytest.raises(LayoutMismatch, match="block_size"):
        TcpKvTransport(memory=make_memory(None, huge, 1), incarnation="d", cluster_key=KEY)


@pytest.mark.parametrize(
    ("endpoint", "parts"), [("h:1", ("h", 1)), ("[::1]:26000", ("::1", 26000))]
)
def test_endpoints_are_host_and_port(endpoint: str, parts: tuple[str, int]) -> None:
    assert split_endpoint(endpoint) == parts


# ---- everything at once


def test_grants_opened_revoked_and_abandoned_at_random_moments_leave_nothing_behind() -> None:
    """The engine's two threads of thought race with the I/O threads; canaries stay, and every revoke is answered."""
    pair = Pair(make_tcp)
    threads = threading.active_count()
    try:
        grants = []
        for round_number in range(150):
            first = round_number % 15 * 2
            grant = pair.grant((first, first + 1))
            grants.append(grant)
            pair.connect(grant)
            pair.push(grant, (first + 1, first))
            if round_number % 3 == 0:
                pair.giver.commit(grant)
            if round_number % 5 == 1:
                pair.giver.abandon(grant)
            if round_number % 2 == 0:
                pair.turn()
            pair.taker.revoke(grant)
            pair.taken_event(KvEventKind.RELEASED, grant)
        released = [event for event in pair.taken if event.kind is KvEventKind.RELEASED]
        assert sorted(event.grant for event in released) == sorted(grants)
        pair.assert_untouched(but=tuple(range(30)))
        assert pair.taker.ledger()["grants_open"] == 0
        for grant in grants:
            pair.giver.abandon(grant)
        assert pair.giver.ledger()["grants_given"] == 0
        last = pair.grant((30, 31))
        pair.give(last, (3, 4))
        pair.taken_event(KvEventKind.LANDED, last)
        pair.assert_copied((3, 4), (30, 31))
        assert threading.active_count() <= threads + 2
    finally:
        pair.close()
