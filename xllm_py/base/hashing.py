"""Digests, keys derived from one secret, and the block-hash chain: one function for whoever asks what is cached.

H0 = h(root | ids of block 0), Hi = h(Hi-1 | ids of block i); ids as 32-bit little-endian; h is BLAKE2b with 16 bytes of
output, keyed from the cluster key (SPEC section 6.7). Tokens after the last full block have no hash of their own in the
prefix cache, but take part in `prompt_digest`, which ties KV in transit to the prompt it was computed from.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Sequence

import xxhash

HASH_BYTES = 16
_BIG_ENDIAN = array("I", [1]).tobytes()[0] == 0
APPROXIMATE = (
    "approximate"  # in place of a numerics fingerprint: the kernels did not keep their promise
)


def _ids_bytes(ids: Sequence[int]) -> bytes:
    words = array("I", ids)
    if _BIG_ENDIAN:
        words.byteswap()
    return words.tobytes()


def chain_root(*, key: bytes, model_fingerprint: str, seed: int = 1024) -> bytes:
    """The parent of every first block: (model, seed) under the cluster key. 16 bytes."""
    text = "\0".join((model_fingerprint, str(seed))).encode()
    return hashlib.blake2b(text, digest_size=HASH_BYTES, key=key[:64]).digest()


def salted(root: bytes, salt: str) -> bytes:
    """The root of those who share this salt; without one the root itself."""
    if not salt:
        return root
    return hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES, key=root).digest()


def block_hashes(root: bytes, ids: Sequence[int], block_size: int) -> list[bytes]:
    """One 16-byte hash per full block of `ids`, each chained to the one before."""
    hashes: list[bytes] = []
    parent, raw, size = root, memoryview(_ids_bytes(ids)), 4 * block_size
    for start in range(0, len(raw) - size + 1, size):
        parent = hashlib.blake2b(
            raw[start : start + size], digest_size=HASH_BYTES, key=parent
        ).digest()
        hashes.append(parent)
    return hashes


def next_hash(parent: bytes, block_ids: Sequence[int]) -> bytes:
    """The hash of a block whose parent is known."""
    return hashlib.blake2b(_ids_bytes(block_ids), digest_size=HASH_BYTES, key=parent).digest()


class Checksum:
    """Of a KV payload that comes in pieces: the low 32 bits of XXH3-64 (Collet, xxHash), which a core computes faster than it copies.

    Finds accidents, proves nothing: whoever changes the bytes on purpose can make another one.
    """

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """The next piece."""
        self._hash.update(piece)

    @property
    def value(self) -> int:
        """Of all pieces so far."""
        return self._hash.intdigest() & 0xFFFFFFFF


def payload_checksum(*pieces: bytes | bytearray | memoryview) -> int:
    """Checksum of these pieces in their order."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0]) & 0xFFFFFFFF
    checksum = Checksum()
    for piece in pieces:
        checksum.add(piece)
    return checksum.value


def prompt_digest(ids: Sequence[int]) -> bytes:
    """16 bytes over a whole token sequence, partial tail block included."""
    return hashlib.blake2b(_ids_bytes(ids), digest_size=HASH_BYTES).digest()


def fingerprint(*parts: str | bytes) -> str:
    """A short hex name for a tuple of facts (model, layout, numerics); length-prefixed, so parts cannot run together."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(key, message, "sha256")


def same(left: bytes, right: bytes) -> bool:
    """Constant-time comparison of two digests."""
    return hmac.compare_digest(left, right)


def derive_key(key: bytes, purpose: str, salt: bytes = b"") -> bytes:
    """HKDF-SHA256 (RFC 5869), 32 bytes: one secret, a key of its own for each purpose."""
    extracted = mac(salt or bytes(32), key)
    return mac(extracted, purpose.encode() + b"\x01")
