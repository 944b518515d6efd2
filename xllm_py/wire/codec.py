"""KV frames and handshake messages as bytes: layouts, limits, reasons. Nothing here keeps state or does I/O.

Frame: a 64-byte header, little-endian, naturally aligned, then `length` bytes of payload.

     0 magic "XKV1"   4 version u8   5 type u8   6 flags u8 = 0   7 part u8 (0 K, 1 V)
     8 seq u64 (+1 each)   16 grant 16 B   32 first u32 (relative block)   36 length u32   40 layer u16   42 count u16
    44 checksum u32       48 mac 16 B = truncated HMAC over bytes 0..47 under the link key of this direction

Called by wire/kv_session; the checks and their order are there.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from xllm_py.base.hashing import same

MAGIC = b"XKV1"
VERSION = 1
HEADER_BYTES = 64
MAX_PAYLOAD_BYTES = 4 << 20
GRANT_BYTES = 16
MAC_BYTES = 16
FRAME_BYTES = (
    512 << 10
)  # what a giver fills a frame to: after its checksum it is still in the core's cache when it is sent
BESIDE_BYTES = 1 << 20  # the same where payloads go beside the socket
MAX_FRAME_BLOCKS = 511  # the giver's own limit: a header and its blocks fit one system call (1,024 buffers on Linux)
NO_GRANT = bytes(GRANT_BYTES)
NONCE_BYTES = 32

_FIELDS = struct.Struct("<4sBBBBQ16sIIHHI")
_SIGNED_BYTES = HEADER_BYTES - MAC_BYTES
_COMMIT = struct.Struct("<I4xQ16s")
COMMIT_BYTES = _COMMIT.size
_ENTRY = struct.Struct("<HHIII")
_HELLO = struct.Struct("<4sBBHHHHH64s32s32s")
_PROOF = struct.Struct("<4sBBH32s")
_LANDING = struct.Struct("<4sI")
LANDING_HEAD_BYTES = _LANDING.size
MAX_LANDING_BYTES = 64 << 10
HANDSHAKE_MAGIC = b"XKH1"
HELLO_BYTES = _HELLO.size
PROOF_BYTES = _PROOF.size


class FrameType(IntEnum):
    """What a frame is."""

    DATA = 1
    COMMIT = 2
    ACK = 3
    ERROR = 4
    RESUME = 5  # giver, on a new link: what became of my COMMIT? taker: nothing yet, send again (else ACK or ERROR)
    PROBE = 6  # giver: bytes for the sink; taker: they came, and as they were sent
    TAKEN = 7  # taker: so many bytes of the shared ring are free again (the number stands in the grant's place)
    FETCH = 8  # taker, on a link it called for: send me what this read grant is about; with `first`, a probe of so many bytes


_KINDS = frozenset(int(kind) for kind in FrameType)


class Step(IntEnum):
    """The messages of a handshake; after PROOF come frames. A giver that connects begins with HELLO, a taker with CALL."""

    CALL = 4  # taker: who I am, what I count blocks in, and which stream I want; HELLO follows from the giver
    HELLO = 1  # giver: who I am, my layout, my nonce
    WELCOME = 2  # taker: the same of its own, followed by its PROOF
    PROOF = 3  # proof of the cluster key over both messages


class Payloads(IntEnum):
    """How payloads get there; the numbers cross the wire. Unless both sides say the same they go over the socket."""

    SOCKET = 0
    NIXL = 1
    MOONCAKE = 2


class Reason(IntEnum):
    """Why a link or a grant was refused; travels in the `count` field of an ERROR frame."""

    BAD_FRAME = 1
    BAD_SEQUENCE = 2
    BAD_MAC = 3
    UNKNOWN_GRANT = 4
    WRONG_STATE = 5
    OUT_OF_RANGE = 6
    BAD_LENGTH = 7
    BAD_CHECKSUM = 8
    CONFLICT = 9
    INCOMPLETE = 10
    DIGEST_DIFFERS = 11
    REVOKED = 12
    WRONG_VERSION = 13
    WRONG_KEY = 14
    WRONG_INCARNATION = 15
    WRONG_LAYOUT = 16
    TOO_MANY_LATE = 17


TEXTS: Mapping[Reason, str] = {
    Reason.BAD_FRAME: "a frame's magic, version, type or flags are wrong",
    Reason.BAD_SEQUENCE: "a frame is out of sequence",
    Reason.BAD_MAC: "a frame's proof is wrong",
    Reason.UNKNOWN_GRANT: "the grant is unknown, or another peer's",
    Reason.WRONG_STATE: "the grant takes no more frames",
    Reason.OUT_OF_RANGE: "layer, part or blocks lie outside the grant",
    Reason.BAD_LENGTH: "a frame's length is not that of its blocks",
    Reason.BAD_CHECKSUM: "a payload does not match its checksum",
    Reason.CONFLICT: "a block came twice with different content",
    Reason.INCOMPLETE: "COMMIT came before every wanted block",
    Reason.DIGEST_DIFFERS: "COMMIT's digest differs: other frames, or another prompt",
    Reason.REVOKED: "the grant was revoked",
    Reason.WRONG_VERSION: "the peer speaks another version of the KV protocol",
    Reason.WRONG_KEY: "the peer has another cluster key",
    Reason.WRONG_INCARNATION: "the peer is another process than the one expected",
    Reason.WRONG_LAYOUT: "the peer's KV layout differs (model, dtype or block size)",
    Reason.TOO_MANY_LATE: "too many frames for grants that were revoked",
}


# said against the grant that an ERROR names; whatever else is said may be the wire's fault, and the grants are served again
OF_THE_GRANT = frozenset(
    {
        Reason.UNKNOWN_GRANT,
        Reason.WRONG_STATE,
        Reason.OUT_OF_RANGE,
        Reason.BAD_LENGTH,
        Reason.CONFLICT,
        Reason.INCOMPLETE,
        Reason.DIGEST_DIFFERS,
        Reason.TOO_MANY_LATE,
    }
)


def reason_of(code: int) -> Reason:
    """A peer's reason; one that we do not know is a bad frame of its own."""
    return Reason(code) if code in Reason.__members__.values() else Reason.BAD_FRAME


class Header(NamedTuple):
    """The fields of a frame header that vary; magic, version, flags and mac are the codec's."""

    type: int
    seq: int
    grant: bytes = NO_GRANT
    part: int = 0
    layer: int = 0
    first: int = 0
    num_blocks: int = 0  # of ERROR: the Reason
    length: int = 0
    checksum: int = 0


class Signer:
    """Makes the mac of one direction of a link."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod=hashlib.sha256)

    def sign(self, fields: bytes) -> bytes:
        """16 bytes over the first 48 bytes of a header."""
        keyed = self._keyed.copy()
        keyed.update(fields)
        return keyed.digest()[:MAC_BYTES]


def blocks_per_frame(block_bytes: int, beside: bool = False) -> int:
    """How many blocks of one layer and part a giver puts in one frame; 0 when not even one fits."""
    if block_bytes > MAX_PAYLOAD_BYTES:
        return 0
    full = BESIDE_BYTES if beside else FRAME_BYTES
    return max(1, min(full // block_bytes, MAX_FRAME_BLOCKS))


def pack_header(header: Header, signer: Signer) -> bytes:
    """64 bytes, signed."""
    kind, seq, grant, part, layer, first, num_blocks, length, checksum = header
    fields = _FIELDS.pack(
        MAGIC, VERSION, kind, 0, part, seq, grant, first, length, layer, num_blocks, checksum
    )
    return fields + signer.sign(fields)


def unpack_header(data: bytes) -> tuple[Header, bool]:
    """The fields of exactly 64 bytes, and whether magic, version, type and flags are ours. Nothing else is checked."""
    magic, version, kind, flags, part, seq, grant, first, length, layer, num_blocks, checksum = (
        _FIELDS.unpack_from(data)
    )
    ours = magic == MAGIC and version == VERSION and flags == 0 and kind in _KINDS
    return Header(kind, seq, grant, part, layer, first, num_blocks, length, checksum), ours


def is_signed(data: bytes, signer: Signer) -> bool:
    """Whether exactly 64 bytes carry the mac they should."""
    return same(data[_SIGNED_BYTES:], signer.sign(data[:_SIGNED_BYTES]))


def pack_commit(num_frames: int, num_bytes: int, digest: bytes) -> bytes:
    """The payload of COMMIT."""
    return _COMMIT.pack(num_frames, num_bytes, digest)


class FrameLog:
    """Which frames of a grant went over the wire, by (layer, part, first block): what COMMIT is about, on both sides."""

    def __init__(self) -> None:
        self._frames: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._bits: dict[tuple[int, int], int] = {}
        self.num_bytes = 0

    def find(self, header: Header) -> tuple[int, int] | None:
        """(count, checksum) of the frame that began at the same block, if there was one."""
        return self._frames.get((header.layer, header.part, header.first))

    def claim(self, header: Header) -> bool:
        """Set the bits of its blocks, so that no other frame can; False when one is set already."""
        place, mask = (header.layer, header.part), _mask(header)
        bits = self._bits.get(place, 0)
        if bits & mask:
            return False
        self._bits[place] = bits | mask
        return True

    def unclaim(self, header: Header) -> None:
        """The payload of a claimed frame did not come, or was damaged."""
        self._bits[header.layer, header.part] &= ~_mask(header)

    def confirm(self, header: Header) -> None:
        """The payload of a claimed frame was sent, or is written and verified."""
        self._frames[header.layer, header.part, header.first] = (header.num_blocks, header.checksum)
        self.num_bytes += header.length

    def sent(self, header: Header) -> None:
        """Giver: note a frame that went out, perhaps again. What overlaps in another way is the taker's to refuse."""
        if self.find(header) != (header.num_blocks, header.checksum):
            self.confirm(header)

    def complete(self, num_layers: int, num_parts: int, wanted: int) -> bool:
        """Whether exactly the blocks in the bit mask `wanted` are there in every layer and part."""
        places = ((layer, part) for layer in range(num_layers) for part in range(num_parts))
        return all(self._bits.get(place, 0) == wanted for place in places)

    def commit_payload(self, prompt_digest: bytes) -> bytes:
        """Frame count, bytes, and BLAKE2b chained over the frames in order (layer, part, block) and the prompt's digest."""
        digest = hashlib.blake2b(digest_size=16, person=b"xllm kv commit")
        for place in sorted(self._frames):
            digest.update(_ENTRY.pack(*place, *self._frames[place]))
        digest.update(prompt_digest)
        return pack_commit(len(self._frames), self.num_bytes, digest.digest())


def _mask(header: Header) -> int:
    return ((1 << header.num_blocks) - 1) << header.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """CALL, HELLO and WELCOME."""

    step: Step
    incarnation: str  # at most 64 bytes of UTF-8
    layout: str  # KvLayout.fingerprint: 32 hex digits
    nonce: bytes  # 32 fresh random bytes
    block_size: int  # tokens; CALL and HELLO: of the blocks that this link's frames count in
    rank: int = 0
    num_ranks: int = 1
    stream: int = (
        0  # of several links between the same two; a new one takes the place of an older one
    )
    payloads: int = Payloads.SOCKET


def pack_hello(hello: Hello) -> bytes:
    """Fixed size. Raises ValueError when a name is too long."""
    incarnation, layout = hello.incarnation.encode(), hello.layout.encode()
    if len(incarnation) > 64 or len(layout) > 32 or len(hello.nonce) != NONCE_BYTES:
        raise ValueError("incarnation, layout or nonce has the wrong size")
    return _HELLO.pack(
        HANDSHAKE_MAGIC,
        VERSION,
        hello.step,
        hello.rank,
        hello.num_ranks,
        hello.stream,
        hello.block_size,
        hello.payloads,
        incarnation,
        layout,
        hello.nonce,
    )


def is_call(data: bytes) -> bool:
    """Whether the first HELLO_BYTES on a link are those of a taker that connected; nothing else is checked."""
    return data[5] == Step.CALL


def unpack_hello(data: bytes, step: Step) -> Hello | Reason:
    """The expected message of exactly HELLO_BYTES, or why it is not one."""
    magic, version, kind, rank, num_ranks, stream, block_size, payloads, *texts, nonce = (
        _HELLO.unpack(data)
    )
    if magic != HANDSHAKE_MAGIC or kind != step:
        return Reason.BAD_FRAME
    if version != VERSION:
        return Reason.WRONG_VERSION
    try:
        names = [name.rstrip(b"\0").decode() for name in texts]
    except UnicodeDecodeError:
        return Reason.BAD_FRAME
    return Hello(
        step=step,
        incarnation=names[0],
        layout=names[1],
        nonce=nonce,
        block_size=block_size,
        rank=rank,
        num_ranks=num_ranks,
        stream=stream,
        payloads=payloads,
    )


def pack_landing(landing: bytes, signer: Signer) -> bytes:
    """Taker, once, before its first frame: where payloads are to be put, in an envelope."""
    data = _LANDING.pack(HANDSHAKE_MAGIC, len(landing)) + landing
    return data + signer.sign(data)


def landing_size(head: bytes) -> int | Reason:
    """Bytes that follow the LANDING_HEAD_BYTES of an envelope."""
    magic, length = _LANDING.unpack(head)
    if magic != HANDSHAKE_MAGIC or length > MAX_LANDING_BYTES:
        return Reason.BAD_FRAME
    return int(length) + MAC_BYTES


def unpack_landing(data: bytes, signer: Signer) -> bytes | Reason:
    """What a whole envelope holds."""
    signed, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
    if not same(mac, signer.sign(signed)):
        return Reason.BAD_MAC
    return signed[LANDING_HEAD_BYTES:]


def pack_proof(proof: bytes) -> bytes:
    """PROOF: 32 bytes of HMAC in an envelope."""
    return _PROOF.pack(HANDSHAKE_MAGIC, VERSION, Step.PROOF, 0, proof)


def unpack_proof(data: bytes) -> bytes | Reason:
    """The proof in exactly PROOF_BYTES, or why there is none."""
    magic, version, kind, spare, proof = _PROOF.unpack(data)
    if magic != HANDSHAKE_MAGIC or version != VERSION or kind != Step.PROOF or spare:
        return Reason.BAD_FRAME
    return bytes(proof)
