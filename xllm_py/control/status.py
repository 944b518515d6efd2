"""Errors of control calls: our exception tree to gRPC status and back.

The leaf travels as `xllm-code` in the trailing metadata, its message as the status' details. A RequestError is rebuilt as
the same leaf; the few internal errors that a caller must tell apart have codes of their own; all else is PeerUnavailable.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from xllm_py.base.errors import (
    LayoutMismatch,
    PeerUnavailable,
    ProtocolViolation,
    RequestError,
    StaleIncarnation,
    XllmError,
    request_error,
)

_INTERNAL: dict[str, tuple[type[XllmError], grpc.StatusCode]] = {
    "layout_mismatch": (LayoutMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    "stale_incarnation": (StaleIncarnation, grpc.StatusCode.FAILED_PRECONDITION),
    "protocol_violation": (ProtocolViolation, grpc.StatusCode.INVALID_ARGUMENT),
    "peer_unavailable": (PeerUnavailable, grpc.StatusCode.UNAVAILABLE),
}
_CODES = {leaf: code for code, (leaf, _) in _INTERNAL.items()}

Trailer = tuple[tuple[str, str], ...]


def to_status(error: XllmError) -> tuple[grpc.StatusCode, str, Trailer]:
    """(status, details, trailing metadata) for an error a handler raised."""
    if isinstance(error, RequestError):
        trailer = [("xllm-code", error.code)]
        if error.param is not None:
            trailer.append(("xllm-param", error.param))
        if error.retry_after_s is not None:
            trailer.append(("xllm-retry-after", str(error.retry_after_s)))
        return grpc.StatusCode[error.grpc_status], error.message, tuple(trailer)
    code = _CODES.get(type(error))
    if code is None:
        return grpc.StatusCode.INTERNAL, error.message, (("xllm-code", "internal_error"),)
    return _INTERNAL[code][1], error.message, (("xllm-code", code),)


def from_status(
    status: grpc.StatusCode, details: str, trailer: Iterable[tuple[str, str | bytes]] | None
) -> XllmError:
    """The error a caller raises for a call that ended with `status`."""
    values = {name: value for name, value in trailer or () if isinstance(value, str)}
    code = values.get("xllm-code")
    if code is None:
        return PeerUnavailable(f"{status.name.lower()}: {details}")
    if code in _INTERNAL:
        return _INTERNAL[code][0](details)
    error = request_error(code, details, param=values.get("xllm-param"))
    error.retry_after_s = _seconds(values.get("xllm-retry-after"))
    return error


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
