"""Bytes of the KV link: the layout is a promise to other versions, and every bit of it is protected."""

from __future__ import annotations

import struct

import pytest

from xllm_py.wire import codec
from xllm_py.wire.codec import FrameLog, FrameType, Header, Hello, Reason, Signer, Step

SIGNER = Signer(b"link key")
HEADER = Header(
    type=FrameType.DATA,
    seq=0x0102030405060708,
    grant=bytes(range(16)),
    part=1,
    layer=23,
    first=7,
    num_blocks=3,
    length=3 * 4096,
    checksum=0xDEADBEEF,
)


def test_the_header_lies_as_documented() -> None:
    data = codec.pack_header(HEADER, SIGNER)
    assert len(data) == codec.HEADER_BYTES == 64
    assert data[:8] == b"XKV1" + bytes([1, 1, 0, 1])
    assert struct.unpack_from("<Q", data, 8) == (0x0102030405060708,)
    assert data[16:32] == bytes(range(16))
    assert struct.unpack_from("<IIHHI", data, 32) == (7, 12288, 23, 3, 0xDEADBEEF)
    assert data[48:] == SIGNER.sign(data[:48])
    assert len(data[48:]) == 16


def test_a_header_comes_back_as_it_went() -> None:
    assert codec.unpack_header(codec.pack_header(HEADER, SIGNER)) == (HEADER, True)


def test_every_flipped_bit_of_a_header_is_seen() -> None:
    data = codec.pack_header(HEADER, SIGNER)
    assert codec.is_signed(data, SIGNER)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not codec.is_signed(bytes(damaged), SIGNER)


@pytest.mark.parametrize("place", [0, 3, 4, 6])
def test_another_magic_version_or_flag_is_not_ours(place: int) -> None:
    data = bytearray(codec.pack_header(HEADER, SIGNER))
    data[place] += 1
    assert codec.unpack_header(bytes(data))[1] is False


@pytest.mark.parametrize("kind", [0, 9, 255])
def test_an_unknown_type_is_not_ours(kind: int) -> None:
    data = codec.pack_header(HEADER._replace(type=kind), SIGNER)
    assert codec.unpack_header(data)[1] is False


def test_a_frame_carries_no_more_than_its_limit() -> None:
    assert codec.blocks_per_frame(4 << 20) == 1
    assert codec.blocks_per_frame((4 << 20) + 1) == 0
    assert codec.blocks_per_frame(1 << 20) == 1
    assert codec.blocks_per_frame(32 << 10) == 16
    assert codec.blocks_per_frame(16) == codec.MAX_FRAME_BLOCKS


def frame(layer: int, part: int, first: int, num_blocks: int, checksum: int) -> Header:
    return HEADER._replace(
        layer=layer, part=part, first=first, num_blocks=num_blocks, checksum=checksum
    )


def log_of(*frames: Header) -> FrameLog:
    log = FrameLog()
    for header in frames:
        assert log.claim(header)
        log.confirm(header)
    return log


def test_the_commit_digest_does_not_depend_on_the_order_of_arrival() -> None:
    frames = [frame(layer, part, 0, 2, layer * 7 + part) for layer in range(3) for part in range(2)]
    digest = b"p" * 16
    forth, back = log_of(*frames), log_of(*reversed(frames))
    assert forth.commit_payload(digest) == back.commit_payload(digest)
    assert len(forth.commit_payload(digest)) == codec.COMMIT_BYTES


def test_the_commit_digest_depends_on_everything_else() -> None:
    base = frame(0, 0, 0, 2, 5)
    others = [
        base._replace(checksum=6),
        base._replace(first=1),
        base._replace(num_blocks=1),
        base._replace(layer=1),
        base._replace(part=1),
    ]
    payloads = {log_of(header).commit_payload(b"p" * 16) for header in [base, *others]}
    payloads.add(log_of(base).commit_payload(b"q" * 16))
    payloads.add(log_of(base, frame(2, 0, 0, 1, 0)).commit_payload(b"p" * 16))
    assert len(payloads) == 8


def test_blocks_are_claimed_once_and_given_back_when_they_did_not_come() -> None:
    log = FrameLog()
    assert log.claim(frame(0, 0, 2, 3, 1))
    assert not log.claim(frame(0, 0, 4, 1, 1))
    assert log.claim(frame(0, 1, 4, 1, 1))
    log.unclaim(frame(0, 0, 2, 3, 1))
    assert log.claim(frame(0, 0, 4, 1, 1))


def test_complete_means_every_wanted_block_of_every_layer_and_part() -> None:
    log = FrameLog()
    for layer in range(2):
        for part in range(2):
            assert not log.complete(2, 2, 0b1100)
            log.claim(frame(layer, part, 2, 2, 0))
    assert log.complete(2, 2, 0b1100)
    assert not log.complete(2, 2, 0b1110)
    assert not log.complete(3, 2, 0b1100)


HELLO = Hello(
    step=Step.HELLO, incarnation="ab" * 16, layout="cd" * 16, block_size=16, nonce=b"n" * 32
)


def test_a_hello_comes_back_as_it_went() -> None:
    data = codec.pack_hello(HELLO)
    assert len(data) == codec.HELLO_BYTES
    assert codec.unpack_hello(data, Step.HELLO) == HELLO
    assert codec.unpack_hello(data, Step.WELCOME) is Reason.BAD_FRAME


def test_a_hello_of_another_version_or_with_broken_names_is_told_apart() -> None:
    data = bytearray(codec.pack_hello(HELLO))
    data[4] = 2
    assert codec.unpack_hello(bytes(data), Step.HELLO) is Reason.WRONG_VERSION
    data[4], data[16] = 1, 0xFF
    assert codec.unpack_hello(bytes(data), Step.HELLO) is Reason.BAD_FRAME


def test_names_that_do_not_fit_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="wrong size"):
        codec.pack_hello(
            Hello(
                step=Step.HELLO,
                incarnation="x" * 65,
                layout="",
                block_size=1,
                nonce=b"n" * 32,
            )
        )


def test_a_proof_comes_back_as_it_went() -> None:
    data = codec.pack_proof(b"p" * 32)
    assert len(data) == codec.PROOF_BYTES
    assert codec.unpack_proof(data) == b"p" * 32
    assert codec.unpack_proof(b"?" + data[1:]) is Reason.BAD_FRAME


def test_every_reason_has_a_text() -> None:
    assert set(codec.TEXTS) == set(Reason)


def test_a_landing_is_signed_and_bounded() -> None:
    data = codec.pack_landing(b"there", SIGNER)
    size = codec.landing_size(data[: codec.LANDING_HEAD_BYTES])
    assert size == len(data) - codec.LANDING_HEAD_BYTES
    assert codec.unpack_landing(data, SIGNER) == b"there"
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        assert codec.unpack_landing(bytes(damaged), SIGNER) is Reason.BAD_MAC
    largest = codec.pack_landing(bytes(codec.MAX_LANDING_BYTES), SIGNER)
    assert codec.landing_size(largest[:8]) == codec.MAX_LANDING_BYTES + codec.MAC_BYTES
    larger = codec.pack_landing(bytes(codec.MAX_LANDING_BYTES + 1), SIGNER)
    assert codec.landing_size(larger[:8]) is Reason.BAD_FRAME
    assert codec.landing_size(b"?" + data[1:8]) is Reason.BAD_FRAME
