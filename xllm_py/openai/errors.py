"""RequestError leaves as OpenAI error objects: the one place that knows their shape.

The message of a RequestError is written for its reader; nothing else of an exception leaves the process.
"""

from __future__ import annotations

import math

import msgspec

from xllm_py.base.errors import RequestError

_RETRY_STATUSES = frozenset({429, 503})


def error_body(error: RequestError) -> bytes:
    """`{"error": {message, type, param, code}}` as JSON."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return msgspec.json.encode({"error": fields})


def error_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """Retry-After in whole seconds, at least 1, where SPEC 7.2 asks for it."""
    if error.http_status not in _RETRY_STATUSES:
        return []
    seconds = max(1, math.ceil(error.retry_after_s or 1.0))
    return [(b"retry-after", str(seconds).encode())]
