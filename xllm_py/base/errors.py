"""Every error the project raises on purpose, on one screen.

    XllmError
    |- RequestError         ends one request; has an HTTP status, an OpenAI type and a code from a closed list
    |    400 invalid_request_error ... 504 timeout_error      (SPEC section 7.6)
    |- StartError           ends the process before it serves; has an exit code            (SPEC section 1.3)
    '- InternalError        a peer or a file broke an agreement; the edge that catches it decides what it ends

A message is cause and fix in one line and safe to show to whoever caused it. RequestErrors travel between
processes as (code, message) and are rebuilt by `request_error`.
"""

from __future__ import annotations

from typing import ClassVar


class XllmError(Exception):
    """Root of the tree; `message` is one line of cause and fix."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(XllmError):
    """Ends one request. `param` names the offending field, `retry_after_s` fills Retry-After."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


def _leaf(name: str, status: int, kind: str, code: str, grpc: str) -> type[RequestError]:
    """Make one leaf class; the table below is easier to read than sixty lines of class bodies."""
    fields = {"http_status": status, "type": kind, "code": code, "grpc_status": grpc}
    return type(name, (RequestError,), {**fields, "__module__": __name__})


_BAD = ("invalid_request_error", "INVALID_ARGUMENT")
_RATE = ("rate_limit_error", "RESOURCE_EXHAUSTED")
_DOWN = ("service_unavailable", "UNAVAILABLE")

InvalidJson = _leaf("InvalidJson", 400, _BAD[0], "invalid_json", _BAD[1])
InvalidType = _leaf("InvalidType", 400, _BAD[0], "invalid_type", _BAD[1])
MissingField = _leaf("MissingField", 400, _BAD[0], "missing_field", _BAD[1])
InvalidValue = _leaf("InvalidValue", 400, _BAD[0], "invalid_value", _BAD[1])
UnsupportedField = _leaf("UnsupportedField", 400, _BAD[0], "unsupported_field", _BAD[1])
UnsupportedValue = _leaf("UnsupportedValue", 400, _BAD[0], "unsupported_value", _BAD[1])
ContextLengthExceeded = _leaf(
    "ContextLengthExceeded", 400, _BAD[0], "context_length_exceeded", _BAD[1]
)
BestOfRequiresPrefixCache = _leaf(
    "BestOfRequiresPrefixCache", 400, _BAD[0], "best_of_requires_prefix_cache", _BAD[1]
)
InvalidApiKey = _leaf(
    "InvalidApiKey", 401, "authentication_error", "invalid_api_key", "UNAUTHENTICATED"
)
Forbidden = _leaf("Forbidden", 403, "permission_error", "forbidden", "PERMISSION_DENIED")
ModelNotFound = _leaf("ModelNotFound", 404, "not_found_error", "model_not_found", "NOT_FOUND")
UnknownRoute = _leaf("UnknownRoute", 404, "not_found_error", "unknown_route", "UNIMPLEMENTED")
RequestNotFound = _leaf("RequestNotFound", 404, "not_found_error", "request_not_found", "NOT_FOUND")
MethodNotAllowed = _leaf("MethodNotAllowed", 405, _BAD[0], "method_not_allowed", "UNIMPLEMENTED")
RequestReadTimeout = _leaf(
    "RequestReadTimeout", 408, "timeout_error", "request_read_timeout", "DEADLINE_EXCEEDED"
)
IdempotencyConflict = _leaf(
    "IdempotencyConflict", 409, _BAD[0], "idempotency_conflict", "ALREADY_EXISTS"
)
RoleNeeded = _leaf("RoleNeeded", 409, _BAD[0], "role_needed", "FAILED_PRECONDITION")
PositionBeyondEnd = _leaf("PositionBeyondEnd", 416, _BAD[0], "position_beyond_end", "OUT_OF_RANGE")
BodyTooLarge = _leaf("BodyTooLarge", 413, _BAD[0], "body_too_large", "OUT_OF_RANGE")
UriTooLong = _leaf("UriTooLong", 414, _BAD[0], "uri_too_long", "OUT_OF_RANGE")
UnsupportedMediaType = _leaf(
    "UnsupportedMediaType", 415, _BAD[0], "unsupported_media_type", "INVALID_ARGUMENT"
)
HeadersTooLarge = _leaf("HeadersTooLarge", 431, _BAD[0], "headers_too_large", "OUT_OF_RANGE")
ConcurrencyLimit = _leaf("ConcurrencyLimit", 429, _RATE[0], "concurrency_limit", _RATE[1])
QueueFull = _leaf("QueueFull", 429, _RATE[0], "queue_full", _RATE[1])
QueueTimeout = _leaf("QueueTimeout", 429, _RATE[0], "queue_timeout", _RATE[1])
NoDecodeCapacity = _leaf("NoDecodeCapacity", 429, _RATE[0], "no_decode_capacity", _RATE[1])
ClientClosed = _leaf("ClientClosed", 499, "client_closed", "client_closed", "CANCELLED")
InternalServerError = _leaf(
    "InternalServerError", 500, "server_error", "internal_error", "INTERNAL"
)
RequestQuarantined = _leaf(
    "RequestQuarantined", 500, "server_error", "request_quarantined", "INTERNAL"
)
RouteNotImplemented = _leaf(
    "RouteNotImplemented", 501, "server_error", "not_implemented", "UNIMPLEMENTED"
)
NoInstances = _leaf("NoInstances", 503, _DOWN[0], "no_instances", _DOWN[1])
NoCompatibleDecode = _leaf("NoCompatibleDecode", 503, _DOWN[0], "no_compatible_decode", _DOWN[1])
NotLeader = _leaf("NotLeader", 503, _DOWN[0], "not_leader", _DOWN[1])
Draining = _leaf("Draining", 503, _DOWN[0], "draining", _DOWN[1])
InstanceLost = _leaf("InstanceLost", 503, _DOWN[0], "instance_lost", _DOWN[1])
EngineDown = _leaf("EngineDown", 503, _DOWN[0], "engine_down", _DOWN[1])
DeadlineExceeded = _leaf(
    "DeadlineExceeded", 504, "timeout_error", "deadline_exceeded", "DEADLINE_EXCEEDED"
)


def _leaves(root: type[RequestError]) -> dict[str, type[RequestError]]:
    return {leaf.code: leaf for leaf in root.__subclasses__()}


def request_error(code: str, message: str, *, param: str | None = None) -> RequestError:
    """Rebuild an error that travelled as (code, message). An unknown code becomes internal_error."""
    return _leaves(RequestError).get(code, InternalServerError)(message, param=param)


class StartError(XllmError):
    """Ends a start: the command prints `<program>: error: <message>` and exits with `exit_code`."""

    exit_code: ClassVar[int] = 1


class UsageError(StartError):
    """A flag, or flags that contradict each other."""

    exit_code = 2


class ModelLoadError(StartError):
    """Model folder, weights or tokenizer missing, broken or not supported."""

    exit_code = 3


class DeviceUnavailable(StartError):
    """Device missing, its library missing, or its memory too small."""

    exit_code = 4


class PortInUse(StartError):
    """A port that was asked for is taken."""

    exit_code = 5


class RegistryUnavailable(StartError):
    """etcd unreachable or refusing at start; later the same error only means `try again`."""

    exit_code = 6


class EngineDied(StartError):
    """The engine process ended although nobody asked it to."""

    exit_code = 7


class InternalError(XllmError):
    """An agreement inside the cluster was broken."""


class IllegalTransition(InternalError):
    """A state machine got an event that its table does not know; names machine, state and event."""

    def __init__(self, machine: str, state: object, event: object) -> None:
        super().__init__(f"{machine}: event {event} is not allowed in state {state}")


class ProtocolViolation(InternalError):
    """A peer sent what the wire format does not allow; the link it came on is closed."""


class LayoutMismatch(InternalError):
    """Two sides disagree about shape, dtype or number of KV blocks."""


class PeerUnavailable(InternalError):
    """A control call to a peer failed or timed out; the peer may or may not have acted on it."""


class StaleIncarnation(PeerUnavailable):
    """The process that was addressed ended, and another one answers at its address; it did not act."""
