"""What a client is told when its request cannot be served: status, type, code and param of SPEC 7.6, by real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Answer, Cluster, Daemon, running, wait_for
from tests.e2e.conftest import DECODE_TOKENS
from tests.e2e.pending import Pending

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BAD = "invalid_request_error"
DOWN = "service_unavailable"
CONTEXT = 2048  # of the tiny model


@pytest.fixture(params=["master", "instance"])
def door(request: pytest.FixtureRequest) -> Daemon:
    """The HTTP door of a cluster, and that of an instance without one; the same code."""
    name = "direct_cluster" if request.param == "master" else "lone_instance"
    cluster = request.getfixturevalue(name)
    assert isinstance(cluster, Cluster)
    return cluster.daemons[0]


def post(daemon: Daemon, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
    """A JSON body; the model is the tiny one unless it is given."""
    return daemon.exchange("POST", path, json.dumps({"model": "tiny", **body}).encode())


def told(answer: Answer) -> tuple[int, str, str, str | None]:
    """(status, type, code, param) of an error answer, whose message must say something."""
    error = answer.error
    assert len(error["message"]) > 10
    return answer.status, error["type"], error["code"], error["param"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("raw", [b'{"model": "tiny", "prompt": "a"', b"", b'{"a": \xff}', b"a=b"])
def test_a_body_that_is_no_json_is_named_so(door: Daemon, path: str, raw: bytes) -> None:
    assert told(door.exchange("POST", path, raw)) == (400, BAD, "invalid_json", None)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "invalid_type", "temperature"),
        (COMPLETIONS, {"prompt": {"text": "a"}}, "invalid_type", "prompt"),
        (COMPLETIONS, {"prompt": "a", "stream": 1}, "invalid_type", "stream"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": 7}]},
            "invalid_type",
            "messages[0].content",
        ),
        (CHAT, {"messages": "hello"}, "invalid_type", "messages"),
        (COMPLETIONS, {}, "missing_field", "prompt"),
        (CHAT, {}, "missing_field", "messages"),
        (COMPLETIONS, {"prompt": ""}, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": [320]}, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": "a", "temperature": 2.5}, "invalid_value", "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "invalid_value", "top_p"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "unsupported_field", "suffix"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    door: Daemon, path: str, body: dict[str, Any], code: str, param: str
) -> None:
    assert told(post(door, body, path)) == (400, BAD, code, param)


@pytest.mark.parametrize(("path", "field"), [(COMPLETIONS, "prompt"), (CHAT, "messages")])
def test_a_model_that_nobody_serves_is_404(door: Daemon, path: str, field: str) -> None:
    content: Any = "a" if field == "prompt" else [{"role": "user", "content": "a"}]
    answer = post(door, {"model": "gpt-9", field: content}, path)
    assert told(answer) == (404, "not_found_error", "model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 2000, "max_tokens": 100}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages"),
    ],
)
def test_a_prompt_beyond_the_context_is_400(
    door: Daemon, path: str, body: dict[str, Any], param: str
) -> None:
    answer = post(door, body, path)
    assert told(answer) == (400, BAD, "context_length_exceeded", param)
    assert str(CONTEXT) in answer.error["message"]


def test_an_unknown_route_is_404(door: Daemon) -> None:
    answer = door.exchange("POST", "/v1/complete", b"{}")
    assert told(answer) == (404, "not_found_error", "unknown_route", None)


@pytest.mark.parametrize(
    ("path", "allow"), [(COMPLETIONS, "POST"), (CHAT, "POST"), ("/ready", "GET")]
)
def test_a_wrong_method_is_405_and_says_which_is_right(door: Daemon, path: str, allow: str) -> None:
    answer = door.exchange("DELETE", path)
    assert told(answer) == (405, BAD, "method_not_allowed", None)
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_content_type_is_415(door: Daemon, kind: str) -> None:
    answer = door.exchange("POST", COMPLETIONS, b"{}", {"content-type": kind})
    assert told(answer) == (415, BAD, "unsupported_media_type", None)


def test_a_body_over_the_limit_is_413(door: Daemon) -> None:
    raw = json.dumps({"model": "tiny", "prompt": "a" * (1 << 20)}).encode()
    assert told(door.exchange("POST", COMPLETIONS, raw)) == (413, BAD, "body_too_large", None)


# ---- deadlines ----

LONG = {
    "model": "tiny",
    "prompt": [[n, 5, 9] for n in range(16)],
    "max_tokens": 2000,
    "ignore_eos": True,
}


@pytest.fixture
def instances(door: Daemon, request: pytest.FixtureRequest) -> list[Daemon]:
    """Those behind the door."""
    if door.name != "master":
        return [door]
    return list(request.getfixturevalue("direct_cluster").daemons[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token_is_504(
    door: Daemon, instances: list[Daemon], stream: bool
) -> None:
    pending = Pending(door, {**LONG, "stream": stream}, headers={"x-request-timeout": "0.001"})
    assert told(pending.answer()) == (504, "timeout_error", "deadline_exceeded", None)
    for instance in instances:
        wait_for(f"{instance.name} to be empty", instance.idle)


def test_a_deadline_inside_a_stream_is_its_last_event(
    door: Daemon, instances: list[Daemon]
) -> None:
    pending = Pending(door, {**LONG, "stream": True}, headers={"x-request-timeout": "2"})
    error = pending.stream_error()
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert len(pending.pieces) > 1
    for instance in instances:
        wait_for(f"{instance.name} to be empty", instance.idle)


# ---- nobody to serve ----


@pytest.fixture(scope="module")
def lone_master(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A master to which no instance came."""
    with running(tmp_path_factory.mktemp("lone_master"), tiny_model) as cluster:
        master = cluster.start_master()
        wait_for("the master", lambda: "ready http=" in master.log())
        yield master


@pytest.mark.parametrize("stream", [False, True])
def test_without_instances_a_request_is_503_with_retry_after(
    lone_master: Daemon, stream: bool
) -> None:
    answer = post(lone_master, {"prompt": "a", "stream": stream})
    assert told(answer) == (503, DOWN, "no_instances", None)
    assert int(answer.headers["retry-after"]) >= 1


def test_without_instances_ready_says_why_and_health_is_good(lone_master: Daemon) -> None:
    status, body = lone_master.request("GET", "/ready")
    assert (status, body["reasons"]) == (503, ["no_instances"])
    assert body["details"] == ["no instance has registered"]
    assert lone_master.request("GET", "/health") == (200, {"status": "healthy"})
    assert lone_master.request("GET", "/v1/models") == (200, {"object": "list", "data": []})


def test_a_request_that_no_decode_instance_can_ever_hold_is_400(slow_cluster: Cluster) -> None:
    answer = post(slow_cluster.daemons[0], {"prompt": [5] * 20, "max_tokens": 2000})
    assert told(answer) == (400, BAD, "context_length_exceeded", None)
    assert str(DECODE_TOKENS) in answer.error["message"]
    short = post(slow_cluster.daemons[0], {"prompt": [5] * 4, "max_tokens": 4})
    assert short.status == 200


# ---- the end ----


def refuses_while_it_drains(door: Daemon) -> None:
    """SIGTERM with an open stream: new requests are refused, the open one ends well, exit code 0."""
    body = {"model": "tiny", "prompt": [3, 5, 9], "max_tokens": 1000, "ignore_eos": True}
    pending = Pending(door, {**body, "stream": True})
    pending.wait_pieces(1)
    door.process.terminate()
    wait_for("/ready to say so", lambda: door.request("GET", "/ready")[0] == 503)
    assert door.request("GET", "/ready")[1]["reasons"] == ["draining"]
    answer = post(door, {"prompt": "a"})
    assert told(answer) == (503, DOWN, "draining", None)
    assert int(answer.headers["retry-after"]) >= 1
    assert pending.answer().status == 200
    assert pending.pieces[-1] == "[DONE]"
    assert door.process.wait(30) == 0


def test_who_drains_refuses_new_requests_and_ends_the_open_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The instance first says that it is loading; then master and instance drain one after the other."""
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        instance = cluster.start_instance("default", "DEFAULT", "--block_size=16")
        wait_for("the instance's door", instance.listens)
        answer = post(instance, {"prompt": "a"})
        assert told(answer) == (503, DOWN, "no_instances", None)
        assert instance.request("GET", "/ready")[1]["reasons"] == ["loading"]
        cluster.wait_ready()
        refuses_while_it_drains(master)
        refuses_while_it_drains(instance)
