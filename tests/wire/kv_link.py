"""A giver's and a taker's session with nothing between them, and D's memory behind the taker."""

from __future__ import annotations

from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS, KvLayout
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import FrameLog, FrameType, Header, Signer
from xllm_py.wire.kv_grants import Grant, GrantTable
from xllm_py.wire.kv_handshake import Identity, Peer
from xllm_py.wire.kv_session import GiverSession, Take
from xllm_py.wire.kv_taker import TakerSession

LAYOUT = KvLayout(num_layers=2, block_size=4, block_bytes=8, shape="test")
NUM_BLOCKS = 16
CANARY = 0xC5
KEY = b"k" * 32
DIGEST = b"d" * 16


def identity(name: str, nonce: int, *, key: bytes = KEY, layout: KvLayout = LAYOUT) -> Identity:
    return Identity(
        incarnation=name, layout=layout, cluster_key=key, nonce=nonce.to_bytes(32, "big")
    )


def grant(
    number: int, block_ids: tuple[int, ...], *, peer: str = "p", first_wanted: int = 0
) -> Grant:
    return Grant(
        grant=number.to_bytes(16, "big"),
        peer=peer,
        block_size=LAYOUT.block_size,
        block_ids=block_ids,
        first_wanted=first_wanted,
        prompt_digest=DIGEST,
    )


class Taker:
    """D: grants, memory, and any number of links."""

    def __init__(self) -> None:
        self.grants = GrantTable()
        self.memory = {
            (layer, part): bytearray([CANARY]) * (NUM_BLOCKS * LAYOUT.block_bytes)
            for layer in range(LAYOUT.num_layers)
            for part in range(PARTS)
        }
        self.nonces = 100

    def link(self, giver: str = "p") -> Link:
        self.nonces += 2
        return Link(self, giver, self.nonces)

    def written(self) -> set[int]:
        """Blocks that hold anything but canaries."""
        size, clean = LAYOUT.block_bytes, bytes([CANARY]) * LAYOUT.block_bytes
        return {
            block
            for region in self.memory.values()
            for block in range(NUM_BLOCKS)
            if region[block * size : (block + 1) * size] != clean
        }


class Link:
    """One open link."""

    def __init__(self, taker: Taker, giver: str, nonce: int) -> None:
        self.taker = taker
        self.giver = GiverSession(identity(giver, nonce), Peer("d"))
        self.session = TakerSession(identity("d", nonce + 1), taker.grants)
        welcome = self.session.on_hello(self.giver.hello())
        assert isinstance(welcome, bytes)
        proof = self.giver.on_welcome(welcome)
        assert isinstance(proof, bytes)
        assert self.session.on_proof(proof) is None
        agreed = identity(giver, nonce).agreement(self.giver.hello() + welcome[: codec.HELLO_BYTES])
        self.signer = Signer(agreed.giver_key)
        self.seq = 0

    def forge(self, header: Header) -> bytes:
        """What an authenticated peer may say, whatever it is, in sequence."""
        data = codec.pack_header(header._replace(seq=self.seq), self.signer)
        self.seq += 1
        return data

    def data(self, number: int, payload: bytes, **fields: int) -> bytes:
        """A DATA header for this payload."""
        header = Header(
            type=FrameType.DATA,
            seq=0,
            grant=number.to_bytes(16, "big"),
            num_blocks=len(payload) // LAYOUT.block_bytes,
            length=len(payload),
            checksum=payload_checksum(payload),
        )
        return self.forge(header._replace(**fields))

    def arrive(self, header: bytes, payload: bytes) -> object:
        """As a transport does it: judge, write what was granted, judge again."""
        judged = self.session.on_header(header)
        if not isinstance(judged, Take):
            return judged
        assert judged.header.length == len(payload)
        if judged.store:
            self.write(judged, payload)
        kept = payload if judged.is_commit else b""
        return self.session.on_payload(judged, payload_checksum(payload), kept)

    def write(self, take: Take, payload: bytes) -> None:
        region, size = self.taker.memory[take.header.layer, take.header.part], LAYOUT.block_bytes
        for index, block in enumerate(take.block_ids):
            region[block * size : (block + 1) * size] = payload[index * size : (index + 1) * size]

    def give(self, number: int, num_blocks: int, first: int = 0) -> FrameLog:
        """Every layer and part of relative blocks first..., one frame each; returns what COMMIT has to say."""
        log = FrameLog()
        for layer in range(LAYOUT.num_layers):
            for part in range(PARTS):
                payload = bytes([layer * 2 + part + 1]) * (num_blocks * LAYOUT.block_bytes)
                header = self.data(number, payload, layer=layer, part=part, first=first)
                assert self.arrive(header, payload) == kv_session.Stored()
                fields = codec.unpack_header(header)[0]
                assert log.claim(fields)
                log.confirm(fields)
        return log

    def commit(self, number: int, payload: bytes, **fields: int) -> object:
        """COMMIT with this payload."""
        header = Header(
            type=FrameType.COMMIT,
            seq=0,
            grant=number.to_bytes(16, "big"),
            length=len(payload),
            checksum=payload_checksum(payload),
        )
        return self.arrive(self.forge(header._replace(**fields)), payload)
