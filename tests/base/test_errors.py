"""The error tree against the tables of the specification (1.3 exit codes, 7.6 errors)."""

from __future__ import annotations

import grpc
import pytest

from xllm_py.base import errors
from xllm_py.base.errors import InternalError, RequestError, StartError, XllmError, request_error

# status, type, codes: SPEC 7.6; rows that belong to routes not built yet are left out
TABLE: list[tuple[int, str, tuple[str, ...]]] = [
    (
        400,
        "invalid_request_error",
        ("invalid_json", "invalid_type", "missing_field", "invalid_value"),
    ),
    (400, "invalid_request_error", ("unsupported_field", "unsupported_value")),
    (400, "invalid_request_error", ("context_length_exceeded", "best_of_requires_prefix_cache")),
    (401, "authentication_error", ("invalid_api_key",)),
    (403, "permission_error", ("forbidden",)),
    (404, "not_found_error", ("model_not_found", "unknown_route", "request_not_found")),
    (405, "invalid_request_error", ("method_not_allowed",)),
    (408, "timeout_error", ("request_read_timeout",)),
    (409, "invalid_request_error", ("idempotency_conflict",)),
    (413, "invalid_request_error", ("body_too_large",)),
    (416, "invalid_request_error", ("position_beyond_end",)),
    (409, "invalid_request_error", ("role_needed",)),
    (414, "invalid_request_error", ("uri_too_long",)),
    (415, "invalid_request_error", ("unsupported_media_type",)),
    (
        429,
        "rate_limit_error",
        ("concurrency_limit", "queue_full", "queue_timeout", "no_decode_capacity"),
    ),
    (431, "invalid_request_error", ("headers_too_large",)),
    (499, "client_closed", ("client_closed",)),
    (500, "server_error", ("internal_error", "request_quarantined")),
    (501, "server_error", ("not_implemented",)),
    (
        503,
        "service_unavailable",
        (
            "no_instances",
            "no_compatible_decode",
            "not_leader",
            "draining",
            "instance_lost",
            "engine_down",
        ),
    ),
    (504, "timeout_error", ("deadline_exceeded",)),
]
WANTED = {code: (status, kind) for status, kind, codes in TABLE for code in codes}
LEAVES = RequestError.__subclasses__()


def test_every_leaf_stands_in_the_table_with_its_status_and_type_and_none_is_missing() -> None:
    assert {leaf.code: (leaf.http_status, leaf.type) for leaf in LEAVES} == WANTED
    assert len(LEAVES) == len(WANTED)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_every_leaf_has_a_status_grpc_knows_and_is_never_ok(leaf: type[RequestError]) -> None:
    assert grpc.StatusCode[leaf.grpc_status] is not grpc.StatusCode.OK
    assert getattr(errors, leaf.__name__) is leaf


def test_a_caller_is_told_to_come_back_only_where_that_helps() -> None:
    again = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    for leaf in LEAVES:
        assert (grpc.StatusCode[leaf.grpc_status] in again) == (leaf.http_status in (429, 503))


@pytest.mark.parametrize("code", sorted(WANTED))
def test_an_error_that_travelled_is_the_leaf_it_was(code: str) -> None:
    rebuilt = request_error(code, "cause; fix", param="model")
    assert type(rebuilt).code == code
    assert (rebuilt.message, rebuilt.param, str(rebuilt)) == ("cause; fix", "model", "cause; fix")
    assert rebuilt.http_status == WANTED[code][0]


def test_an_unknown_code_is_an_internal_error() -> None:
    for code in ("", "abort", "no such code"):
        rebuilt = request_error(code, "text")
        assert (rebuilt.code, rebuilt.http_status) == ("internal_error", 500)


def test_a_time_to_come_back_is_kept() -> None:
    error = errors.QueueFull("full", retry_after_s=1.5)
    assert (error.retry_after_s, error.param) == (1.5, None)


def test_exit_codes_are_those_of_the_specification() -> None:
    assert {leaf.__name__: leaf.exit_code for leaf in StartError.__subclasses__()} == {
        "UsageError": 2,
        "ModelLoadError": 3,
        "DeviceUnavailable": 4,
        "PortInUse": 5,
        "RegistryUnavailable": 6,
        "EngineDied": 7,
    }
    assert StartError.exit_code == 1


def test_everything_raised_on_purpose_has_one_root() -> None:
    raised = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert len(raised) > 40
    assert all(issubclass(value, XllmError) for value in raised)
    branches = (RequestError, StartError, InternalError)
    for value in set(raised) - {XllmError}:
        assert sum(issubclass(value, branch) for branch in branches) == 1


def test_an_illegal_transition_names_machine_state_and_event() -> None:
    error = errors.IllegalTransition("engine", "running", "Start")
    assert error.message == "engine: event Start is not allowed in state running"
