"""Statuses of requests, failures of backends, deadline, concurrency limit, drain."""

from __future__ import annotations

import pytest

from tests.openai.support import EchoBackend, check_error
from xllm_py.base.errors import EngineDown, InstanceLost, NoDecodeCapacity
from xllm_py.openai.backend import Readiness


async def test_no_model_at_all_is_503_with_retry_after(make):
    state = Readiness(ready=False, reasons=("no_card",))
    door = make(backend=EchoBackend(served=(), state=state))
    answer = await door.complete("x")
    check_error(answer, 503, "no_instances", None)
    assert int(answer.headers["retry-after"]) >= 1


async def test_no_pair_that_fits_is_told_apart_from_nobody_there(make):
    state = Readiness(ready=False, reasons=("no_compatible_decode",))
    door = make(backend=EchoBackend(served=(), state=state))
    answer = await door.complete("x")
    check_error(answer, 503, "no_compatible_decode", None)
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (InstanceLost("gone"), 503, "instance_lost"),
        (EngineDown("down"), 503, "engine_down"),
        (NoDecodeCapacity("full", retry_after_s=2.2), 429, "no_decode_capacity"),
        (ZeroDivisionError("secret 0x7f"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("prompt", ["abc", ["abc", "def"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    make, failure, status, code, prompt, stream
):
    door = make(backend=EchoBackend(fail_at=0, failure=failure))
    answer = await door.complete(prompt, stream=stream)
    check_error(answer, status, code, None)
    assert b"secret" not in answer.body
    if status == 429:
        assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("failure", [InstanceLost("gone"), ZeroDivisionError("secret 0x7f")])
@pytest.mark.parametrize("prompt", ["abcdef", ["abcdef", "abcdef"]])
async def test_a_failure_in_a_stream_is_its_last_event(make, failure, prompt):
    door = make(backend=EchoBackend(fail_at=3, failure=failure))
    answer = await door.complete(prompt, stream=True)
    assert answer.status == 200
    assert answer.complete
    assert answer.text() == "abc"
    last = answer.events[-1]["error"]
    assert last["code"] == getattr(failure, "code", "internal_error")
    assert b"[DONE]" not in answer.body
    assert b"secret" not in answer.body
    assert answer.finishes() == {}


async def test_an_answer_without_a_finish_is_an_error(make):
    door = make(backend=EchoBackend(finish=""))
    check_error(await door.complete("x"), 500, "internal_error", None)


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("GET", "/nothing", {}, None, 404, "unknown_route"),
        ("GET", "/v1/completions", {}, None, 405, "method_not_allowed"),
        ("POST", "/v1/models", {}, {}, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", {}, None, 404, "model_not_found"),
        ("POST", "/v1/embeddings", {}, {}, 501, "not_implemented"),
        ("POST", "/sleep", {}, None, 501, "not_implemented"),
        (
            "POST",
            "/v1/completions",
            {"content-type": "text/plain"},
            {},
            415,
            "unsupported_media_type",
        ),
        (
            "POST",
            "/v1/completions",
            {"content-encoding": "gzip"},
            {},
            415,
            "unsupported_media_type",
        ),
        ("POST", "/v1/completions", {"content-length": "9999999"}, {}, 413, "body_too_large"),
        ("POST", "/v1/completions", {"host": "evil.example"}, {}, 403, "forbidden"),
        ("POST", "/v1/completions", {"x-request-timeout": "soon"}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"x-request-timeout": "-1"}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"x-request-timeout": "nan"}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {}, b"{", 400, "invalid_json"),
    ],
)
async def test_a_wrong_request_gets_its_status(door, method, path, headers, body, status, code):
    answer = await door.ask(method, path, body, headers=headers)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert ("allow" in answer.headers) == (status == 405)


async def test_a_body_that_grows_too_large_is_refused(make):
    door = make(max_body_bytes=100)
    pieces = [b" " * 60, b" " * 60]
    headers = {"transfer-encoding": "chunked", "content-length": "0"}
    answer = await door.ask("POST", "/v1/completions", {}, headers=headers, pieces=pieces)
    assert answer.status == 413


async def test_a_body_that_does_not_come_is_408(make):
    door = make(read_timeout_s=0.05)
    call = door.call("POST", "/v1/completions", {}, pieces=[])
    assert (await call.done()).error["code"] == "request_read_timeout"


async def test_the_deadline_is_504_before_and_an_event_after_the_first_token(make):
    door = make(backend=EchoBackend(hold_at=2))
    headers = {"x-request-timeout": "0.05"}
    body = {"model": "tiny", "prompt": "abcd"}
    answer = await door.ask("POST", "/v1/completions", body, headers=headers)
    check_error(answer, 504, "deadline_exceeded", None)
    body["stream"] = True
    answer = await door.ask("POST", "/v1/completions", body, headers=headers)
    assert (answer.status, answer.text()) == (200, "ab")
    assert answer.events[-1]["error"]["code"] == "deadline_exceeded"
    assert len(door.backend.closed_early) == 2
    assert all(0 < s.timeout_s <= 0.05 for s in door.backend.submissions)


async def test_a_client_cannot_lengthen_the_deadline(make):
    door = make(request_timeout_s=5.0)
    body = {"model": "tiny", "prompt": "abcd"}
    await door.ask("POST", "/v1/completions", body, headers={"x-request-timeout": "999"})
    assert door.backend.submissions[0].timeout_s <= 5.0


async def test_open_streams_count_against_the_limit(make):
    door = make(backend=EchoBackend(hold_at=1), max_concurrent_requests=2)
    body = {"model": "tiny", "prompt": "abcd", "stream": True}
    calls = [door.call("POST", "/v1/completions", body) for _ in range(2)]
    await door.backend.until(lambda: door.backend.num_open == 2, "two open streams")
    refused = await door.complete("x")
    check_error(refused, 429, "concurrency_limit", None)
    assert "retry-after" in refused.headers
    assert (await door.ask("GET", "/health")).status == 200
    door.backend.release.set()
    assert [(await call.done()).text() for call in calls] == ["abcd", "abcd"]
    assert (await door.complete("x")).status == 200
    assert door.metric('xllm_requests_rejected_total{reason="concurrency_limit"}') == 1


async def test_draining_refuses_the_new_and_finishes_the_old(make):
    door = make(backend=EchoBackend(hold_at=1))
    body = {"model": "tiny", "prompt": "abcd", "stream": True}
    call = door.call("POST", "/v1/completions", body)
    await door.backend.until(lambda: door.backend.num_open == 1, "an open stream")
    door.app.begin_drain()
    check_error(await door.complete("x"), 503, "draining", None)
    ready = await door.ask("GET", "/ready")
    assert (ready.status, ready.json()["reasons"]) == (503, ["draining"])
    assert not await door.app.drained(0.01)
    door.backend.release.set()
    assert await door.app.drained(5)
    assert (await call.done()).events[-1] == "[DONE]"


async def test_closing_ends_open_streams_with_an_error_event(make):
    door = make(backend=EchoBackend(hold_at=1))
    body = {"model": "tiny", "prompt": "abcd", "stream": True}
    call = door.call("POST", "/v1/completions", body)
    await door.backend.until(lambda: call.answer.sends > 1, "the first token")
    await door.app.close()
    answer = await call.done()
    assert answer.complete
    assert answer.events[-1]["error"]["code"] == "draining"
    assert len(door.backend.closed_early) == 1
