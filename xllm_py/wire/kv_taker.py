"""D's end of one KV link as a state machine; see wire/kv_session, whose results it speaks in. Called by the transports."""

from __future__ import annotations

from xllm_py.base.hashing import same
from xllm_py.core.kv_memory import PARTS
from xllm_py.core.kv_plan import HeadRoute
from xllm_py.wire import codec
from xllm_py.wire.codec import FrameType, Header, Reason, Step
from xllm_py.wire.kv_frames import Frames
from xllm_py.wire.kv_grants import OPEN, Grant, GrantState, GrantTable
from xllm_py.wire.kv_handshake import (
    Agreement,
    Identity,
    Peer,
    cut_as,
    payloads_with,
    peer_of,
)
from xllm_py.wire.kv_session import (
    Asked,
    Closed,
    Landed,
    Late,
    Probed,
    Reject,
    Result,
    Stored,
    Take,
)

MAX_LATE_FRAMES = 4096  # of one revoked grant; an honest giver stops at the first ERROR


class TakerSession:
    """D's end. The grants are shared with other links. calls: the giver that we connect to (PULL)."""

    def __init__(self, identity: Identity, grants: GrantTable, calls: Peer | None = None) -> None:
        self._calls = calls
        self._call = identity.hello(Step.CALL) if calls is not None else b""
        self._identity = identity
        self._grants = grants
        self._agreed: Agreement | None = None
        self._layout = identity.layout
        self._out = Frames(b"")
        self._in = Frames(b"")
        self.peer = ""  # name of the giver; set by on_hello, true after on_proof
        self.route: HeadRoute | None = None  # which of our heads it has; likewise
        self.stream = 0  # likewise
        self.payloads = codec.Payloads.SOCKET  # likewise
        self._peer_fits = False

    @property
    def block_size(self) -> int:
        """Tokens of the blocks that frames of this link count in, true once on_proof said so."""
        return self._layout.block_size

    def call(self) -> bytes:
        """The first bytes on a link that we connect."""
        return self._call

    def on_hello(self, data: bytes) -> bytes | Reason:
        """HELLO_BYTES from a stranger. Returns WELCOME and our proof."""
        peer = codec.unpack_hello(data, Step.HELLO)
        if isinstance(peer, Reason):
            return peer
        who = peer_of(peer)
        if self._calls and (who, peer.stream) != (self._calls, self._identity.stream):
            return Reason.WRONG_INCARNATION
        welcome = self._identity.hello(Step.WELCOME)
        self._agreed = self._identity.agreement(self._call + data + welcome)
        self.peer, self.stream = who.name, peer.stream
        self.payloads = payloads_with(peer, self._identity.payloads)
        self.route = self._identity.share.route_from(who.rank, who.num_ranks)
        layout = cut_as(peer, self._identity)
        if self._calls and layout != self._identity.layout:
            return Reason.WRONG_LAYOUT
        if layout is not None and self.route is not None:
            self._peer_fits, self._layout = True, layout.heads(self.route.count)
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
            case FrameType.ACK | FrameType.TAKEN | FrameType.FETCH:
                return Reject(Reason.BAD_FRAME)
            case FrameType.RESUME:
                return self._judge_resume(header)
            case FrameType.PROBE:
                return self._judge_probe(header)
        grant = self._grants.find(header.grant, self.peer)
        if grant is None:
            return self._judge_unknown(header)
        if grant.block_size != self.block_size:
            return Reject(Reason.WRONG_LAYOUT, grant.grant)
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
        again = known == (header.num_blocks, header.checksum)
        if not again and not grant.frames.claim(header):
            grant.state = GrantState.FAILED
            return Reject(Reason.CONFLICT, grant.grant, failed=True)
        grant.state = GrantState.RECEIVING
        grant.in_flight += 1
        return Take(header, grant, store=not again)

    def on_payload(self, take: Take, checksum: int, payload: bytes = b"") -> Result:
        """The payload has come; `checksum` is what it gives here. `payload`: the bytes themselves, for COMMIT only."""
        grant, stored = take.grant, take.store
        self.leave(take)
        if checksum != take.header.checksum:
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

    def landing(self, landing: bytes) -> bytes:
        """Say, before the first frame, where payloads are to be put."""
        return codec.pack_landing(landing, self._out.signer)

    def ack(self, grant: bytes) -> bytes:
        """Say landed."""
        return self._out.pack(Header(type=FrameType.ACK, seq=self._out.seq, grant=grant))

    def fetch(self, read_grant: bytes, probe_bytes: int = 0) -> bytes:
        """Ask for what a read grant is about, or for a probe of that name; on a link that we called for."""
        return self._out.pack(Header(FrameType.FETCH, self._out.seq, read_grant, first=probe_bytes))

    def taken(self, total: int) -> bytes:
        """Say how many bytes of the shared ring were taken."""
        name = total.to_bytes(codec.GRANT_BYTES, "little")
        return self._out.pack(Header(type=FrameType.TAKEN, seq=self._out.seq, grant=name))

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
