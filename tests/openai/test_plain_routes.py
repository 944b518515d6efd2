"""Models, health, readiness, tokenize, version, metrics, labels, extra routes."""

from __future__ import annotations

import dataclasses

import pytest

from tests.openai.support import MODEL, EchoBackend, make_door
from xllm_py.openai.backend import Readiness


async def test_models_are_listed_and_found(make):
    model = dataclasses.replace(MODEL, name="org/tiny")
    door = make(backend=EchoBackend(served=(MODEL, model)))
    listed = (await door.ask("GET", "/v1/models")).json()
    assert [row["id"] for row in listed["data"]] == ["tiny", "org/tiny"]
    row = (await door.ask("GET", "/v1/models/org/tiny")).json()
    assert row == {
        "id": "org/tiny",
        "object": "model",
        "created": 7,
        "owned_by": "xllm",
        "max_model_len": 256,
    }


@pytest.mark.parametrize("path", ["/ready", "/health/ready"])
async def test_readiness_says_why_not(make, path):
    door = make()
    door.backend.state = Readiness(ready=True, mode="pd")
    assert (await door.ask("GET", path)).json() == {"status": "ready", "mode": "pd"}
    door.backend.state = Readiness(
        ready=False, reasons=("no_instances",), details=("no decode instance is linked",)
    )
    answer = await door.ask("GET", path)
    assert answer.status == 503
    assert answer.json()["reasons"] == ["no_instances"]
    assert answer.json()["details"] == ["no decode instance is linked"]


@pytest.mark.parametrize("path", ["/health", "/health/live"])
async def test_health_is_about_this_process_and_recovers(make, path):
    door = make()
    door.backend.state = Readiness(ready=False, reasons=("no_instances",))
    assert (await door.ask("GET", path)).json() == {"status": "healthy"}
    door.backend.state = Readiness(ready=False, reasons=("engine_stalled",))
    assert (await door.ask("GET", path)).status == 503
    door.backend.state = Readiness(ready=True)
    assert (await door.ask("GET", path)).status == 200


async def test_tokenize_and_detokenize_are_inverse(door):
    answer = await door.ask("POST", "/tokenize", {"prompt": "☃<|end|>"})
    tokens = answer.json()["tokens"]
    assert answer.json()["count"] == len(tokens) == 4
    back = await door.ask("POST", "/detokenize", {"tokens": tokens})
    assert back.json() == {"prompt": "☃<|end|>"}
    bad = await door.ask("POST", "/detokenize", {"tokens": [-1]})
    assert bad.error["param"] == "tokens"


async def test_version_and_metrics_answer(make):
    door = make(version={"device": "cpu:0"})
    version = (await door.ask("GET", "/version")).json()
    assert version["name"] == "xllm_py"
    assert version["device"] == "cpu:0"
    await door.complete("abc", stream=True)
    text = (await door.ask("GET", "/metrics")).body.decode()
    assert "xllm_prompt_tokens_total 3.0" in text
    assert "xllm_generation_tokens_total 3.0" in text
    assert "xllm_time_to_first_token_seconds_count 1.0" in text
    assert "xllm_inter_token_latency_seconds_count 2.0" in text
    assert "xllm_e2e_request_latency_seconds_count 1.0" in text
    assert 'xllm_requests_total{code="200"} 2.0' in text


async def test_probes_are_counted_apart(make):
    door = make(backend=EchoBackend(state=Readiness(ready=False, reasons=("loading",))))
    for path in ("/health", "/health/live", "/ready", "/health/ready", "/metrics"):
        await door.ask("GET", path)
    await door.ask("GET", "/version")
    assert door.metric('xllm_requests_total{code="200"}') == 1
    assert door.metric('xllm_requests_total{code="503"}') == 0
    assert door.metric('xllm_probes_total{code="200"}') == 3
    assert door.metric('xllm_probes_total{code="503"}') == 2


async def test_labels_are_echoed_and_never_become_ids(door):
    body = {"model": "tiny", "prompt": "x"}
    headers = {"x-request-id": "my-label", "x-request-time": "12:00"}
    answer = await door.ask("POST", "/v1/completions", body, headers=headers)
    assert answer.headers["x-request-id"] == "my-label"
    assert answer.headers["x-request-time"] == "12:00"
    assert "my-label" not in door.backend.submissions[0].request_id
    answer = await door.ask("POST", "/v1/completions", body, headers={"x-request-id": "a b\r\n"})
    assert answer.headers["x-request-id"].startswith("req-")
    answer = await door.complete("x", request_id="from-body")
    assert answer.headers["x-request-id"] == "from-body"


async def test_a_trace_is_carried_on_under_a_span_of_ours(door):
    trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{span}-01"}
    answer = await door.ask(
        "POST", "/v1/completions", {"model": "tiny", "prompt": ["x", "y"]}, headers=headers
    )
    version, ours, child, flags = answer.headers["traceparent"].split("-")
    assert (version, ours, flags) == ("00", trace, "01")
    assert child != span
    assert [each.trace for each in door.backend.submissions] == [answer.headers["traceparent"]] * 2


@pytest.mark.parametrize(
    "given",
    [
        "",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
    ],
)
async def test_a_trace_that_is_none_is_not_carried_on(door, given):
    headers = {"traceparent": given}
    answer = await door.ask(
        "POST", "/v1/completions", {"model": "tiny", "prompt": "x"}, headers=headers
    )
    assert answer.status == 200
    assert "traceparent" not in answer.headers
    assert door.backend.submissions[0].trace == ""


async def test_extra_routes_of_a_daemon_are_served(model_folder):
    async def ledger(request):
        return 200, {"free": 3}

    async def drain(request):
        return 202, {"name": request.params["name"], "body": request.body.decode()}

    routes = {("GET", "/debug/ledger"): ledger, ("POST", "/admin/instances/{name}/drain"): drain}
    closed = make_door(model_folder, extra_routes=routes)
    assert (await closed.ask("GET", "/debug/ledger")).status == 404
    answer = await closed.ask("POST", "/admin/instances/127.0.0.1:8010/drain", {"mode": "move"})
    assert answer.status == 202
    assert answer.json() == {"name": "127.0.0.1:8010", "body": '{"mode": "move"}'}
    opened = make_door(model_folder, extra_routes=routes, debug_endpoints=True)
    assert (await opened.ask("GET", "/debug/ledger")).json() == {"free": 3}
    await closed.app.close()
    await opened.app.close()
