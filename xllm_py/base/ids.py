"""The only place that makes identifiers.

request ids are labels for people and keys of the token log; incarnation ids are new at each process start; grant ids
are 128 bits from the system's generator, because a grant is a capability.
"""

from __future__ import annotations

import re
import secrets

_TRACE = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_LABEL = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id(prefix: str) -> str:
    """`cmpl-...` or `chatcmpl-...`: the prefix and 96 random bits in hex."""
    return f"{prefix}-{secrets.token_hex(12)}"


def life_of(request_id: str) -> str:
    """A name for one time that this request is computed: the id, and 32 random bits in hex behind a dot."""
    return f"{request_id}.{secrets.token_hex(4)}"


def is_life_of(life: str, request_id: str) -> bool:
    """Whether `life_of` made it of this id."""
    return life.rpartition(".")[0] == request_id


def incarnation_id() -> str:
    """128 random bits in hex, made once per process."""
    return secrets.token_hex(16)


def grant_id() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(16)


def seed() -> int:
    """A sampling seed for a request that brought none: 63 bits, so that it fits a signed int64."""
    return secrets.randbits(63)


def child_trace(parent: str | None) -> str:
    """A `traceparent` of our own under the client's, for whoever we call; empty when it gave none, or one that is none.

    Source: W3C Trace Context, section 3.2.
    """
    found = _TRACE.fullmatch(parent or "")
    if (
        found is None
        or found["version"] == "ff"
        or not found["trace"].strip("0")
        or not found["span"].strip("0")
    ):
        return ""
    return f"00-{found['trace']}-{secrets.token_hex(8)}-{found['flags']}"


def label_or_new(label: str | None, prefix: str) -> str:
    """The client's `x-request-id` when it is harmless (128 of `[A-Za-z0-9._:-]`), else a new id."""
    if label is not None and _LABEL.fullmatch(label):
        return label
    return request_id(prefix)
