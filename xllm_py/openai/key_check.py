"""API keys: who may come in. Keys are compared as digests, all of them, in constant time; none is ever logged."""

from __future__ import annotations

from collections.abc import Mapping

from xllm_py.base.errors import InvalidApiKey
from xllm_py.base.hashing import fingerprint, same

# answered without a key, and then without reasons
OPEN_PATHS = frozenset({"/health", "/health/live", "/ready", "/health/ready"})


class KeyRing:
    """id -> key; an empty ring lets everybody in."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: fingerprint(key).encode() for name, key in keys.items()}

    def holder(self, authorization: str | None) -> str | None:
        """The id behind an Authorization header, "" when no keys are in use, None when it is wrong or missing."""
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = fingerprint(key.strip()).encode()
        found: str | None = None
        for name, digest in self._digests.items():
            if same(digest, given) and scheme.lower() == "bearer":
                found = name
        return found

    def check(self, path: str, authorization: str | None) -> None:
        """Raise InvalidApiKey unless the path is open or the key is known."""
        if self.holder(authorization) is None and path not in OPEN_PATHS:
            raise InvalidApiKey("send the header authorization: Bearer <key> with a valid key")
