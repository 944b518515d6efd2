"""One KV link as two state machines, giver and taker, without socket, clock or randomness.

    giver: hello() ... on_welcome(bytes) ... frames out by data(), commit(); frames in by on_header()
    either side may connect: a taker that does begins with call(), and sends fetch() for what it wants (PULL)
    taker: on_hello(bytes) ... on_proof(bytes) ... frames in by on_header(), on_payload(); frames out by ack(), error()

HELLO and WELCOME carry incarnation, layout and a fresh nonce; each side proves the cluster key over all of it, and the
link's keys, one per direction, are derived from them. A header is judged completely before a byte of its payload is read, in
this order: magic, version, type - sequence - mac - grant known, this peer's, open - ranges - length - not a contradiction.
What is wrong comes back as a Reject, never as an exception. Called by the transports.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py.base.hashing import same
from xllm_py.wire import codec
from xllm_py.wire.codec import FrameType, Header, Reason, Step
from xllm_py.wire.kv_frames import Frames
from xllm_py.wire.kv_grants import Grant
from xllm_py.wire.kv_handshake import Identity, Peer, payloads_with, peer_of

WELCOME_BYTES = codec.HELLO_BYTES + codec.PROOF_BYTES
_ANSWERS = (FrameType.ACK, FrameType.ERROR, FrameType.RESUME, FrameType.PROBE, FrameType.TAKEN)


@dataclass(frozen=True, slots=True)
class Reject:
    """Say ERROR and close the link; when `failed`, the grant has ended too."""

    reason: Reason
    grant: bytes = codec.NO_GRANT
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """The grant was revoked while its frames were under way: the link goes on, the giver is told to stop."""

    grant: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """The payload is in place, or was there already."""


@dataclass(frozen=True, slots=True)
class Landed:
    """COMMIT verified: acknowledge it."""

    grant: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Asked:
    """The giver asks on a new link what became of a COMMIT: acknowledge it when it has `landed`, else say resume."""

    grant: bytes
    landed: bool


@dataclass(frozen=True, slots=True)
class Again:
    """The taker says: this grant has not landed, send its frames and COMMIT again."""

    grant: bytes


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe came, whole: say so."""

    probe: bytes


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The taker says: landed, or, of a probe, arrived."""

    grant: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """The taker says how many bytes of the shared ring it has taken, in all."""

    total: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The taker wants what this read grant is about; or, when `probe_bytes`, a probe of that name and size."""

    read_grant: bytes
    probe_bytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The taker says: this grant is dead, the link goes on."""

    grant: bytes
    reason: Reason


@dataclass(frozen=True, slots=True)
class Closed:
    """The link is dead: the peer said ERROR, or broke the protocol."""

    reason: Reason
    by_peer: bool
    grant: bytes = codec.NO_GRANT  # what the peer's ERROR was about


class Take:
    """A header that passed: read `header.length` bytes, into the blocks when `store` is set, else into the sink."""

    __slots__ = ("grant", "header", "store")

    def __init__(self, header: Header, grant: Grant | None, store: bool) -> None:
        self.header = header
        self.grant = grant
        self.store = store

    @property
    def is_data(self) -> bool:
        """Of blocks, be they stored or not."""
        return self.header.type == FrameType.DATA

    @property
    def is_commit(self) -> bool:
        """The payload is that of a COMMIT; keep it."""
        return self.header.type == FrameType.COMMIT

    @property
    def block_ids(self) -> tuple[int, ...]:
        """The taker's blocks it goes to, in order."""
        if self.grant is None:
            return ()
        first = self.header.first
        return self.grant.block_ids[first : first + self.header.num_blocks]


class GiverSession:
    """P's end. call: the CALL of a taker that connected, and may fetch."""

    def __init__(self, identity: Identity, peer: Peer, call: bytes = b"") -> None:
        self._call = call
        self._identity = identity
        self.peer = peer
        self._route = identity.share.route_to(peer.rank, peer.num_ranks)
        count = self._route.count if self._route is not None else identity.layout.num_heads
        self._block_bytes = identity.layout.heads(count).block_bytes
        self._hello = identity.hello(Step.HELLO)
        self._out = Frames(b"")
        self._in = Frames(b"")
        self.payloads = codec.Payloads.SOCKET  # true after on_welcome

    @property
    def place(self) -> tuple[str, int]:
        """Which peer, and which of the links to it."""
        return self.peer.name, self._identity.stream

    @property
    def block_size(self) -> int:
        """Tokens of the blocks that frames of this link count in."""
        return self._identity.layout.block_size

    def hello(self) -> bytes:
        """The first bytes on the link."""
        return self._hello

    def on_welcome(self, data: bytes) -> bytes | Reason:
        """WELCOME_BYTES from the taker. Returns the last message of the handshake; frames may follow it at once."""
        welcome, tail = data[: codec.HELLO_BYTES], data[codec.HELLO_BYTES :]
        peer, proof = codec.unpack_hello(welcome, Step.WELCOME), codec.unpack_proof(tail)
        if isinstance(peer, Reason):
            return peer
        if isinstance(proof, Reason):
            return proof
        agreed = self._identity.agreement(self._call + self._hello + welcome)
        if not same(proof, agreed.taker_proof):
            return Reason.WRONG_KEY
        if peer_of(peer) != self.peer:
            return Reason.WRONG_INCARNATION
        if peer.layout != self._identity.whole or self._route is None:
            return Reason.WRONG_LAYOUT
        self.payloads = payloads_with(peer, self._identity.payloads)
        self._out, self._in = Frames(agreed.giver_key), Frames(agreed.taker_key)
        return codec.pack_proof(agreed.giver_proof)

    def on_landing(self, data: bytes) -> bytes | Reason:
        """The taker's envelope, whole: where payloads are to be put."""
        return codec.unpack_landing(data, self._in.signer)

    def data(
        self, grant: bytes, layer: int, part: int, first: int, num_blocks: int, checksum: int
    ) -> tuple[Header, bytes]:
        """The header of the next frame, as fields and as bytes; its payload follows it."""
        header = Header(
            type=FrameType.DATA,
            seq=self._out.seq,
            grant=grant,
            part=part,
            layer=layer,
            first=first,
            num_blocks=num_blocks,
            length=num_blocks * self._block_bytes,
            checksum=checksum,
        )
        return header, self._out.pack(header)

    def commit(self, grant: bytes, payload: bytes, checksum: int) -> bytes:
        """COMMIT, header only; `payload` is FrameLog.commit_payload and follows it."""
        header = Header(
            type=FrameType.COMMIT,
            seq=self._out.seq,
            grant=grant,
            length=len(payload),
            checksum=checksum,
        )
        return self._out.pack(header)

    def resume(self, grant: bytes) -> bytes:
        """Ask what became of a COMMIT that went over a link which broke before it was answered."""
        return self._out.pack(Header(type=FrameType.RESUME, seq=self._out.seq, grant=grant))

    def probe(self, probe: bytes, length: int, checksum: int) -> bytes:
        """PROBE, header only; `length` bytes follow it."""
        return self._out.pack(
            Header(FrameType.PROBE, self._out.seq, probe, length=length, checksum=checksum)
        )

    def on_header(self, data: bytes) -> Acknowledged | Again | Taken | Fetched | Refused | Closed:
        """64 bytes from the taker; its frames have no payload."""
        header = self._in.unpack(data)
        if isinstance(header, Reason):
            return Closed(header, by_peer=False)
        if header.type == FrameType.FETCH and self._call and not header.length:
            if header.first > codec.MAX_PAYLOAD_BYTES:
                return Closed(Reason.BAD_LENGTH, by_peer=False)
            return Fetched(header.grant, header.first)
        if header.length or header.type not in _ANSWERS:
            return Closed(Reason.BAD_FRAME, by_peer=False)
        if header.type in (FrameType.ACK, FrameType.PROBE):
            return Acknowledged(header.grant)
        if header.type == FrameType.RESUME:
            return Again(header.grant)
        if header.type == FrameType.TAKEN:
            return Taken(int.from_bytes(header.grant, "little"))
        reason = codec.reason_of(header.num_blocks)
        if reason is Reason.REVOKED:
            return Refused(header.grant, reason)
        return Closed(reason, by_peer=True, grant=header.grant)


Result = Stored | Landed | Probed | Late | Reject
