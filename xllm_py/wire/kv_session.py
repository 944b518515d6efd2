"""One KV link as two state machines, giver and taker, without socket, clock or randomness.

    giver: hello() ... on_welcome(bytes) ... frames out by data(), commit(); frames in by on_header()
    taker: on_hello(bytes) ... on_proof(bytes) ... frames in by on_header(), on_payload(); frames out by ack(), error()

HELLO and WELCOME carry incarnation, layout and a fresh nonce; each side proves the cluster key over both messages, and the
link's keys, one per direction, are derived from them. A header is judged completely before a byte of its payload is read, in
this order: magic, version, type - sequence - mac - grant known, this peer's, open - ranges - length - not a contradiction.
What is wrong comes back as a Reject, never as an exception. Called by the transports.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py.base.hashing import same
from xllm_py.core.kv_memory import PARTS
from xllm_py.wire import codec
from xllm_py.wire.codec import FrameType, Header, Reason, Step
from xllm_py.wire.kv_frames import Frames
from xllm_py.wire.kv_grants import OPEN, Grant, GrantState, GrantTable
from xllm_py.wire.kv_handshake import Agreement, Identity, fits

WELCOME_BYTES = codec.HELLO_BYTES + codec.PROOF_BYTES
_ANSWERS = (FrameType.ACK, FrameType.ERROR, FrameType.RESUME, FrameType.PROBE)
MAX_LATE_FRAMES = 4096  # of one revoked grant; an honest giver stops at the first ERROR


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
    """P's end."""

    def __init__(self, identity: Identity, peer_incarnation: str) -> None:
        self._identity = identity
        self._peer_incarnation = peer_incarnation
        self._hello = identity.hello(Step.HELLO)
        self._out = Frames(b"")
        self._in = Frames(b"")

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
        agreed = self._identity.agreement(self._hello, welcome)
        if not same(proof, agreed.taker_proof):
            return Reason.WRONG_KEY
        if peer.incarnation != self._peer_incarnation:
            return Reason.WRONG_INCARNATION
        if not fits(peer, self._identity.layout):
            return Reason.WRONG_LAYOUT
        self._out, self._in = Frames(agreed.giver_key), Frames(agreed.taker_key)
        return codec.pack_proof(agreed.giver_proof)

    def data(
        self, grant: bytes, layer: int, part: int, first: int, num_blocks: int, crc: int
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
            length=num_blocks * self._identity.layout.block_bytes,
            crc=crc,
        )
        return header, self._out.pack(header)

    def commit(self, grant: bytes, payload: bytes, crc: int) -> bytes:
        """COMMIT, header only; `payload` is FrameLog.commit_payload and follows it."""
        header = Header(
            type=FrameType.COMMIT, seq=self._out.seq, grant=grant, length=len(payload), crc=crc
        )
        return self._out.pack(header)

    def resume(self, grant: bytes) -> bytes:
        """Ask what became of a COMMIT that went over a link which broke before it was answered."""
        return self._out.pack(Header(type=FrameType.RESUME, seq=self._out.seq, grant=grant))

    def probe(self, probe: bytes, length: int, crc: int) -> bytes:
        """PROBE, header only; `length` bytes follow it."""
        return self._out.pack(Header(FrameType.PROBE, self._out.seq, probe, length=length, crc=crc))

    def on_header(self, data: bytes) -> Acknowledged | Again | Refused | Closed:
        """64 bytes from the taker; its frames have no payload."""
        header = self._in.unpack(data)
        if isinstance(header, Reason):
            return Closed(header, by_peer=False)
        if header.length or header.type not in _ANSWERS:
            return Closed(Reason.BAD_FRAME, by_peer=False)
        if header.type in (FrameType.ACK, FrameType.PROBE):
            return Acknowledged(header.grant)
        if header.type == FrameType.RESUME:
            return Again(header.grant)
        reason = codec.reason_of(header.num_blocks)
        if reason is Reason.REVOKED:
            return Refused(header.grant, reason)
        return Closed(reason, by_peer=True, grant=header.grant)


class TakerSession:
    """D's end. The grants are shared with other links."""

    def __init__(self, identity: Identity, grants: GrantTable) -> None:
        self._identity = identity
        self._grants = grants
        self._agreed: Agreement | None = None
        self._layout = identity.layout
        self._out = Frames(b"")
        self._in = Frames(b"")
        self.peer = ""  # incarnation of the giver; set by on_hello, true after on_proof
        self.stream = 0  # likewise
        self._peer_fits = False

    def on_hello(self, data: bytes) -> bytes | Reason:
        """HELLO_BYTES from a stranger. Returns WELCOME and our proof."""
        peer = codec.unpack_hello(data, Step.HELLO)
        if isinstance(peer, Reason):
            return peer
        welcome = self._identity.hello(Step.WELCOME)
        self._agreed = self._identity.agreement(data, welcome)
        self.peer, self.stream = peer.incarnation, peer.stream
        self._peer_fits = fits(peer, self._layout)
        return welcome + codec.pack_proof(self._agreed.taker_proof)

    def on_proof(self, data: bytes) -> Reason | None:
        """PROOF_BYTES; None: the link is open."""
        proof = codec.unpack_proof(data)
        if isinstance(proof, Reason):
            return proof
        if self._agreed is None or not same(proof, self._agreed.giver_proof):
            return Reason.WRONG_KEY
        if not self._peer_fits:
            return Reason.WRONG_LAYOUT
        self._out, self._in = Frames(self._agreed.taker_key), Frames(self._agreed.giver_key)
        return None

    def on_header(self, data: bytes) -> Take | Asked | Late | Reject | Closed:
        """64 bytes from the giver. After a Take comes on_payload or on_lost, whatever happens."""
        header = self._in.unpack(data)
        if isinstance(header, Reason):
            return Reject(header)
        match header.type:
            case FrameType.ERROR:
                return Closed(codec.reason_of(header.num_blocks), by_peer=True)
            case FrameType.ACK:
                return Reject(Reason.BAD_FRAME)
            case FrameType.RESUME:
                return self._judge_resume(header)
            case FrameType.PROBE:
                return self._judge_probe(header)
        grant = self._grants.find(header.grant, self.peer)
        if grant is None:
            return self._judge_unknown(header)
        if grant.state not in OPEN:
            return Reject(Reason.WRONG_STATE, grant.grant)
        if header.type == FrameType.COMMIT:
            return self._judge_commit(header, grant)
        return self._judge_data(header, grant)

    def _judge_resume(self, header: Header) -> Asked | Late | Reject:
        if header.length or header.first or header.num_blocks or header.layer or header.part:
            return Reject(Reason.OUT_OF_RANGE, header.grant)
        state = self._grants.state(header.grant, self.peer)
        if state is None or state is GrantState.FAILED:
            reason = Reason.WRONG_STATE if state else Reason.UNKNOWN_GRANT
            return Reject(reason, header.grant)
        if state is GrantState.REVOKED:
            return Late(header.grant)
        return Asked(header.grant, landed=state is GrantState.COMMITTED)

    def _judge_probe(self, header: Header) -> Take | Reject:
        """Its bytes go nowhere, so it needs no grant."""
        if header.length > codec.MAX_PAYLOAD_BYTES:
            return Reject(Reason.BAD_LENGTH, header.grant)
        return Take(header, None, store=False)

    def _judge_unknown(self, header: Header) -> Take | Reject:
        if not self._grants.is_late(header.grant, self.peer):
            return Reject(Reason.UNKNOWN_GRANT, header.grant)
        if header.length != self._length(header):
            return Reject(Reason.BAD_LENGTH, header.grant)
        if self._grants.count_late(header.grant) > MAX_LATE_FRAMES:
            return Reject(Reason.TOO_MANY_LATE, header.grant)
        return Take(header, None, store=False)

    def _length(self, header: Header) -> int:
        """What the payload must have, or -1 when that is too much."""
        if header.type == FrameType.COMMIT:
            return codec.COMMIT_BYTES
        length = header.num_blocks * self._layout.block_bytes
        return length if length <= codec.MAX_PAYLOAD_BYTES else -1

    def _judge_commit(self, header: Header, grant: Grant) -> Take | Reject:
        if header.first or header.num_blocks or header.layer or header.part:
            return Reject(Reason.OUT_OF_RANGE, grant.grant)
        if header.length != self._length(header):
            return Reject(Reason.BAD_LENGTH, grant.grant)
        grant.in_flight += 1
        return Take(header, grant, store=False)

    def _judge_data(self, header: Header, grant: Grant) -> Take | Reject:
        inside = (
            header.part < PARTS
            and header.layer < self._layout.num_layers
            and header.num_blocks >= 1
            and header.first >= grant.first_wanted
            and header.first + header.num_blocks <= len(grant.block_ids)
        )
        if not inside:
            return Reject(Reason.OUT_OF_RANGE, grant.grant)
        if header.length != self._length(header):
            return Reject(Reason.BAD_LENGTH, grant.grant)
        known = grant.frames.find(header)
        again = known == (header.num_blocks, header.crc)
        if not again and not grant.frames.claim(header):
            grant.state = GrantState.FAILED
            return Reject(Reason.CONFLICT, grant.grant, failed=True)
        grant.state = GrantState.RECEIVING
        grant.in_flight += 1
        return Take(header, grant, store=not again)

    def on_payload(self, take: Take, crc: int, payload: bytes = b"") -> Result:
        """The payload has come; `crc` is what it gives here. `payload`: the bytes themselves, for COMMIT only."""
        grant, stored = take.grant, take.store
        self.leave(take)
        if crc != take.header.crc:
            if grant is not None and stored:
                grant.frames.unclaim(take.header)
            return Reject(Reason.BAD_CHECKSUM, take.header.grant)
        if take.header.type == FrameType.PROBE:
            return Probed(take.header.grant)
        if grant is None or grant.state is GrantState.REVOKED:
            return Late(take.header.grant)
        if take.is_commit:
            return self._on_commit(grant, payload)
        if stored:
            grant.frames.confirm(take.header)
        return Stored()

    def _on_commit(self, grant: Grant, payload: bytes) -> Result:
        if grant.state not in OPEN:
            return Reject(Reason.WRONG_STATE, grant.grant)
        whole = grant.in_flight == 0 and grant.frames.complete(
            self._layout.num_layers, PARTS, grant.wanted
        )
        reason = None if whole else Reason.INCOMPLETE
        if whole and not same(payload, grant.frames.commit_payload(grant.prompt_digest)):
            reason = Reason.DIGEST_DIFFERS
        if reason is not None:
            grant.state = GrantState.FAILED
            return Reject(reason, grant.grant, failed=True)
        grant.state = GrantState.COMMITTED
        return Landed(grant.grant, grant.frames.num_bytes)

    def on_lost(self, take: Take) -> None:
        """The link broke inside the payload."""
        if take.grant is not None and take.store:
            take.grant.frames.unclaim(take.header)
        self.leave(take)

    def leave(self, take: Take) -> None:
        """Nothing of this frame will be written any more; what is left of its payload goes into the sink. Idempotent."""
        if take.grant is not None:
            take.grant.in_flight -= 1
        take.grant, take.store = None, False

    def ack(self, grant: bytes) -> bytes:
        """Say landed."""
        return self._out.pack(Header(type=FrameType.ACK, seq=self._out.seq, grant=grant))

    def arrived(self, probe: bytes) -> bytes:
        """Answer a probe."""
        return self._out.pack(Header(type=FrameType.PROBE, seq=self._out.seq, grant=probe))

    def again(self, grant: bytes) -> bytes:
        """Say that a grant has not landed."""
        return self._out.pack(Header(type=FrameType.RESUME, seq=self._out.seq, grant=grant))

    def error(self, reason: Reason, grant: bytes = codec.NO_GRANT) -> bytes:
        """Say why; REVOKED ends a grant, every other reason the link."""
        return self._out.pack(
            Header(type=FrameType.ERROR, seq=self._out.seq, grant=grant, num_blocks=reason)
        )


Result = Stored | Landed | Probed | Late | Reject
