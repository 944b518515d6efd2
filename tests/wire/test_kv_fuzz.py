"""Whatever bytes come, from strangers or from a peer that holds the key: no exception, and nothing outside a live grant."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.kv_link import DIGEST, LAYOUT, NUM_BLOCKS, Link, Taker, grant, identity
from xllm_py.base.hashing import payload_checksum
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Header
from xllm_py.wire.kv_grants import GrantState, GrantTable
from xllm_py.wire.kv_handshake import Peer
from xllm_py.wire.kv_session import GiverSession, Take
from xllm_py.wire.kv_taker import TakerSession

EDGES = [0, 1, 2, 3, 4, 7, 8, 16, 24, 255, 2**16 - 1, 2**31, 2**32 - 1]


def edge(bits: int) -> st.SearchStrategy[int]:
    """Small numbers, limits, and anything."""
    most = 2**bits - 1
    return st.one_of(
        st.integers(0, 5),
        st.sampled_from([value for value in EDGES if value <= most]),
        st.integers(0, most),
    )


@given(data=st.binary(min_size=64, max_size=64), known=st.booleans())
@settings(max_examples=1500, deadline=None)
def test_random_headers_are_rejected_by_both_sides(data: bytes, known: bool) -> None:
    link = Taker().link()
    data = codec.MAGIC + bytes([1, data[5] % 6, 0]) + data[7:] if known else data
    assert isinstance(link.session.on_header(data), kv_session.Reject)
    assert isinstance(link.giver.on_header(data), kv_session.Closed)


@given(data=st.binary(min_size=kv_session.WELCOME_BYTES, max_size=kv_session.WELCOME_BYTES))
@settings(max_examples=500, deadline=None)
def test_random_handshakes_open_nothing(data: bytes) -> None:
    giver = GiverSession(identity("p", 1), Peer("d"))
    taker = TakerSession(identity("d", 2), GrantTable())
    assert isinstance(giver.on_welcome(data), codec.Reason)
    taker.on_hello(data[: codec.HELLO_BYTES])
    assert taker.on_proof(data[codec.HELLO_BYTES :]) is not None


headers = st.builds(
    Header,
    type=st.one_of(st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6, 7, 8]), edge(8)),
    seq=st.just(0),
    grant=st.integers(0, 6).map(lambda number: number.to_bytes(16, "big")),
    part=st.one_of(st.integers(0, 1), edge(8)),
    layer=st.one_of(st.integers(0, 1), edge(16)),
    first=edge(32),
    num_blocks=edge(16),
    length=st.one_of(st.none(), edge(32)),  # None: the right one
    checksum=st.one_of(st.none(), edge(32)),
)
steps = st.one_of(
    headers,
    headers,
    headers,
    st.tuples(st.just("revoke"), st.integers(0, 4)),
    st.tuples(st.just("commit"), st.integers(0, 4)),
)


class Hostile:
    """An authenticated peer and D; knows which blocks it may touch."""

    def __init__(self, patience: int = 1) -> None:
        """patience: rejected frames of one link; a transport has none, but the machine must bear it."""
        self.patience, self.rejected = patience, 0
        self.taker = Taker()
        self.entries = [
            grant(0, (3, 1)),
            grant(1, (4, 5, 6), first_wanted=1),
            grant(2, (7,), peer="somebody else"),
            grant(3, ()),
            grant(4, (9, 8, 10, 11)),
        ]
        for entry in self.entries:
            self.taker.grants.open(entry)
        self.link: Link = self.taker.link()
        self.allowed = {3, 1, 5, 6, 9, 8, 10, 11}

    def act(self, step: Header | tuple[str, int]) -> None:
        if isinstance(step, Header):
            self.send(step)
        elif step[0] == "revoke":
            self.revoke(step[1])
        else:
            entry = self.entries[step[1]]
            self.link.commit(step[1], entry.frames.commit_payload(DIGEST))
            self.link = self.taker.link()

    def revoke(self, number: int) -> None:
        """After it the blocks of the grant must keep what they hold: put canaries there and stop allowing them."""
        entry = self.entries[number]
        self.taker.grants.revoke(entry.grant)
        for block in entry.block_ids:
            self.allowed.discard(block)
            for region in self.taker.memory.values():
                size = LAYOUT.block_bytes
                region[block * size : (block + 1) * size] = b"\xc5" * size

    def send(self, header: Header) -> None:
        length = header.num_blocks * LAYOUT.block_bytes if header.length is None else header.length
        small = bytes(length) if length <= 1 << 16 else b""
        checksum = payload_checksum(small) if header.checksum is None else header.checksum
        judged = self.link.session.on_header(
            self.link.forge(header._replace(length=length, checksum=checksum))
        )
        result: object = judged
        if isinstance(judged, Take):
            assert judged.header.length == length <= 4 << 20
            payload = small or bytes(length)
            if judged.store:
                self.link.write(judged, payload)
            kept = payload if judged.is_commit else b""
            result = self.link.session.on_payload(judged, payload_checksum(payload), kept)
        if isinstance(result, kv_session.Reject | kv_session.Closed):
            self.rejected += 1
            self.link.seq = self.link.session._in.seq
            if self.rejected % self.patience == 0:
                self.link = self.taker.link()


@given(st.lists(steps, max_size=25))
@settings(max_examples=400, deadline=None)
def test_an_authenticated_hostile_peer_writes_inside_live_grants_only(
    actions: list[Header | tuple[str, int]],
) -> None:
    hostile = Hostile()
    for action in actions:
        hostile.act(action)
        assert hostile.taker.written() <= hostile.allowed
    for entry in hostile.entries:
        assert entry.in_flight == 0
        if entry.state is GrantState.COMMITTED:
            assert entry.frames.complete(LAYOUT.num_layers, 2, entry.wanted)
    assert hostile.allowed < set(range(NUM_BLOCKS))


@given(bit=st.integers(0, 64 * 8 + 16 * 8 - 1))
@settings(max_examples=600, deadline=None)
def test_one_flipped_bit_anywhere_in_a_frame_never_lands(bit: int) -> None:
    taker = Taker()
    taker.grants.open(grant(1, (5, 9)))
    link = taker.link()
    payload = bytes(range(16))
    frame = bytearray(link.data(1, payload) + payload)
    frame[bit // 8] ^= 1 << bit % 8
    result = link.arrive(bytes(frame[:64]), bytes(frame[64:]))
    assert isinstance(result, kv_session.Reject)
    assert taker.written() <= {5, 9}
