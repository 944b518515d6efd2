"""Who calls, who is meant, and the proof that the caller knows the cluster key: metadata of every control call.

    xllm-from   incarnation of the caller          xllm-nonce  random, per call
    xllm-to     incarnation addressed, or empty    xllm-proof  HMAC(control key, method | from | to | nonce), hex

The proof keeps strangers out on a trusted network; it does not hide or protect the message itself, which is TLS's work.
A repeated call is harmless because every call is idempotent by (request, attempt).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from xllm_py.base.errors import InvalidApiKey, StaleIncarnation
from xllm_py.base.hashing import derive_key, mac, same

Metadata = tuple[tuple[str, str], ...]
_MAX_VALUE = 256


def control_key(cluster_key: bytes) -> bytes:
    """The key of control calls; cards, KV links and cache hashes have others."""
    return derive_key(cluster_key, "control calls")


def metadata(key: bytes, *, method: str, sender: str, addressee: str) -> Metadata:
    """What a caller sends along; `key` is a control key, `method` the full name `/package.Service/Method`."""
    nonce = secrets.token_hex(8)
    return (
        ("xllm-from", sender),
        ("xllm-to", addressee),
        ("xllm-nonce", nonce),
        ("xllm-proof", _proof(key, method, sender, addressee, nonce)),
    )


def check(key: bytes, given: Mapping[str, str], *, method: str, incarnation: str) -> str:
    """Return the caller's incarnation. Raises InvalidApiKey, or StaleIncarnation when another life is addressed."""
    names = ("xllm-from", "xllm-to", "xllm-nonce")
    sender, addressee, nonce = (given.get(name, "")[:_MAX_VALUE] for name in names)
    wanted = _proof(key, method, sender, addressee, nonce)
    if not same(given.get("xllm-proof", "").encode(), wanted.encode()):
        raise InvalidApiKey("the call's cluster key is another one; do all daemons use the same?")
    if addressee not in ("", incarnation):
        raise StaleIncarnation("the addressed process ended; another one answers at its address")
    return sender


def _proof(key: bytes, *parts: str) -> str:
    return mac(key, "\0".join(parts).encode()).hex()
