"""Hashes that P, D and master must agree on: fixed values, and what makes two of them differ."""

from __future__ import annotations

import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from xllm_py.base.hashing import (
    Checksum,
    block_hashes,
    chain_root,
    derive_key,
    fingerprint,
    mac,
    next_hash,
    payload_checksum,
    prompt_digest,
    salted,
    same,
)

ROOT = chain_root(key=b"k" * 32, model_fingerprint="model")
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_root_is_blake2b_over_model_and_seed_under_the_key() -> None:
    wanted = hashlib.blake2b(b"model\x001024", digest_size=16, key=b"k" * 32).digest()
    assert wanted == ROOT


def test_ids_are_hashed_as_32_bit_little_endian() -> None:
    ids = [1, 256, 2**32 - 1]
    raw = bytes.fromhex("0100000000010000ffffffff")
    assert prompt_digest(ids) == hashlib.blake2b(raw, digest_size=16).digest()
    assert next_hash(ROOT, ids) == hashlib.blake2b(raw, digest_size=16, key=ROOT).digest()


def test_key_model_seed_and_salt_each_make_another_root() -> None:
    roots = {
        ROOT,
        chain_root(key=b"x" * 32, model_fingerprint="model"),
        chain_root(key=b"k" * 32, model_fingerprint="other"),
        chain_root(key=b"k" * 32, model_fingerprint="model", seed=1),
        salted(ROOT, "tenant"),
        salted(ROOT, "other tenant"),
    }
    assert len(roots) == 6
    assert salted(ROOT, "") == ROOT


@given(token_ids, st.integers(1, 9))
def test_there_is_one_hash_per_full_block_each_chained_to_the_one_before(
    ids: list[int], size: int
) -> None:
    hashes = block_hashes(ROOT, ids, size)
    assert len(hashes) == len(ids) // size
    parent = ROOT
    for number, one in enumerate(hashes):
        parent = next_hash(parent, ids[number * size : (number + 1) * size])
        assert one == parent
        assert len(one) == 16


@given(token_ids, token_ids, st.integers(1, 5))
def test_two_prompts_share_hashes_exactly_as_far_as_they_share_blocks(
    left: list[int], right: list[int], size: int
) -> None:
    pairs = zip(block_hashes(ROOT, left, size), block_hashes(ROOT, right, size), strict=False)
    for number, (one, other) in enumerate(pairs, start=1):
        assert (one == other) == (left[: number * size] == right[: number * size])


@given(token_ids, token_ids)
def test_a_digest_names_the_whole_prompt_with_its_tail(left: list[int], right: list[int]) -> None:
    assert (prompt_digest(left) == prompt_digest(right)) == (left == right)


def test_parts_of_a_fingerprint_do_not_run_together() -> None:
    names = {
        fingerprint("ab", "c"),
        fingerprint("a", "bc"),
        fingerprint("abc"),
        fingerprint("abc", ""),
        fingerprint(),
    }
    assert len(names) == 5
    assert fingerprint("a") == fingerprint(b"a")
    assert len(fingerprint("x")) == 32


def test_derived_keys_are_hkdf_of_rfc_5869() -> None:
    """Test case 1 of its appendix A, with its binary info given as text where that is possible: one block of output."""
    key, salt = b"\x0b" * 22, bytes(range(13))
    extracted = hmac.new(salt, key, hashlib.sha256).digest()
    assert (
        extracted.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    )  # the RFC's PRK
    wanted = hmac.new(extracted, b"cards\x01", hashlib.sha256).digest()
    assert derive_key(key, "cards", salt) == wanted


def test_every_purpose_and_secret_has_its_own_key() -> None:
    keys = {
        derive_key(b"a" * 32, "cards"),
        derive_key(b"a" * 32, "control"),
        derive_key(b"b" * 32, "cards"),
        derive_key(b"a" * 32, "cards", b"salt"),
    }
    assert len(keys) == 4


def test_a_mac_is_hmac_sha256_and_is_compared_whole() -> None:
    code = mac(b"key", b"The quick brown fox jumps over the lazy dog")
    assert code.hex() == "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
    assert same(code, bytes(code))
    assert not same(code, code[:-1])
    assert not same(code, code[:-1] + b"x")


def test_a_payloads_checksum_does_not_depend_on_its_pieces() -> None:
    data = bytes(range(256)) * 20
    whole = payload_checksum(data)
    assert payload_checksum(memoryview(data)[:7], data[7:3000], bytearray(data[3000:])) == whole
    running = Checksum()
    running.add(data[:1])
    running.add(data[1:])
    assert running.value == whole
    assert payload_checksum() == payload_checksum(b"") != whole
    assert 0 <= whole < 2**32


def test_a_payloads_checksum_is_what_the_wire_format_says() -> None:
    """Known values of XXH3-64 without a seed: of nothing, and of `a`."""
    assert payload_checksum(b"") == 0x2D06800538D394C2 & 0xFFFFFFFF
    assert payload_checksum(b"a") == 0xE6C632B61E964E1F & 0xFFFFFFFF
