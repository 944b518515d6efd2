"""The routes over an echo backend: what a client gets for what it sends."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.openai.support import MODEL, EchoBackend, make_door
from xllm_py.base.errors import EngineDown, InstanceLost, NoDecodeCapacity
from xllm_py.openai.backend import Readiness

USER = {"role": "user", "content": "hi"}


async def test_a_completion_echoes_its_prompt_with_usage(door):
    answer = await door.complete("héllo ☃")
    assert answer.status == 200
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["id"] == door.backend.submissions[0].request_id
    assert body["choices"] == [
        {"index": 0, "text": "héllo ☃", "logprobs": None, "finish_reason": "stop"}
    ]
    num = len("héllo ☃".encode())
    assert body["usage"] == {
        "prompt_tokens": num,
        "completion_tokens": num,
        "total_tokens": 2 * num,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["model"] == "tiny"
    assert body["system_fingerprint"] == "fp_1"


async def test_a_chat_is_rendered_by_the_template(door):
    answer = await door.chat("hi", skip_special_tokens=False)
    assert answer.status == 200, answer.body
    message = answer.json()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


async def test_text_parts_are_joined_by_newlines(door):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = await door.chat(parts)
    assert answer.json()["choices"][0]["message"]["content"] == "user\na\nb\nassistant\n"


async def test_a_chat_stream_has_role_content_finish_usage_and_done(door):
    answer = await door.chat("hi", stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.text() == "user\nhi\nassistant\n"
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] > 0
    assert all(event["usage"] is None for event in events[:-2])
    assert events[-1] == "[DONE]"


async def test_a_stream_without_the_option_has_no_usage(door):
    answer = await door.complete("abc", stream=True)
    assert answer.text() == "abc"
    assert all("usage" not in event for event in answer.events[:-1])
    assert answer.events[-1] == "[DONE]"


@pytest.mark.parametrize("piece", [1, 3, 100])
async def test_streamed_and_whole_answers_are_equal_for_any_delta_size(make, piece):
    door = make(backend=EchoBackend(piece=piece))
    text = "a😀 a wide word ☃ stop here"
    fields = {"stop": ["stop"], "max_tokens": 40}
    whole = (await door.complete(text, **fields)).json()
    stream = await door.complete(
        text, stream=True, stream_options={"include_usage": True}, **fields
    )
    assert stream.text() == whole["choices"][0]["text"] == "a😀 a wide word ☃ "
    assert stream.finishes() == {0: "stop"}
    assert stream.events[-2]["usage"] == whole["usage"]


async def test_one_delta_is_one_send(make):
    door = make(backend=EchoBackend(piece=100))
    answer = await door.complete("abcdef", stream=True)
    assert answer.sends == 3  # headers, everything, [DONE]


async def test_event_ids_name_request_choice_and_position(door):
    answer = await door.complete("abc", stream=True)
    request_id = door.backend.submissions[0].request_id
    lines = [line for line in answer.body.decode().splitlines() if line.startswith("id: ")]
    assert lines == [f"id: {request_id}:0:{position}" for position in range(3)]


async def test_a_stop_string_closes_the_generator(make):
    door = make()
    answer = await door.complete("abcXdef" * 5, stop="X")
    assert answer.json()["choices"][0] == {
        "index": 0,
        "text": "abc",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert door.backend.closed_early == [answer.json()["id"]]
    assert door.backend.num_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["one", "two longer", "3"], [[65, 66], [67], [68, 69, 70]]])
async def test_several_prompts_are_choices_in_their_order(make, prompts, stream):
    door = make()
    answer = await door.complete(prompts, stream=stream)
    decode = door.tokenizer.decode
    expected = [p if isinstance(p, str) else decode(p, skip_special_tokens=True) for p in prompts]
    if stream:
        assert [answer.text(index) for index in range(3)] == expected
        assert answer.finishes() == dict.fromkeys(range(3), "stop")
    else:
        assert [c["text"] for c in answer.json()["choices"]] == expected
        assert [c["index"] for c in answer.json()["choices"]] == [0, 1, 2]
        assert answer.json()["usage"]["prompt_tokens"] == sum(
            len(s.prompt_ids) for s in door.backend.submissions
        )
    assert len({s.request_id for s in door.backend.submissions}) == 3
    assert len({s.sampling.seed for s in door.backend.submissions}) == 3


async def test_one_prompt_at_its_stop_string_does_not_end_the_others(make):
    door = make()
    answer = await door.complete(["abcXdefgh", "hijklmnop"], stop="X", stream=True)
    assert [answer.text(0), answer.text(1)] == ["abc", "hijklmnop"]
    assert len(door.backend.closed_early) == 1


async def test_token_ids_are_a_prompt(door):
    answer = await door.complete([65, 66, 67])
    assert door.backend.submissions[0].prompt_ids == (65, 66, 67)
    assert answer.status == 200


async def test_max_tokens_one_gives_one_token(door):
    for stream in (False, True):
        answer = await door.complete("abc", max_tokens=1, stream=stream)
        text = answer.text() if stream else answer.json()["choices"][0]["text"]
        assert text == "a"
    assert (await door.complete("abc", max_tokens=1)).json()["choices"][0][
        "finish_reason"
    ] == "length"


async def test_defaults_come_from_the_model_and_the_context(make):
    model = dataclasses.replace(
        MODEL, sampling_defaults={"temperature": 0.5, "top_k": 20.0, "other": 3.0}
    )
    door = make(backend=EchoBackend(served=(model,)))
    await door.complete("abc")
    await door.complete("abc", temperature=0, top_k=5, seed=-7, max_tokens=9)
    first, second = (submission.sampling for submission in door.backend.submissions)
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.5, 20, 1.0, 253)
    assert (second.temperature, second.top_k, second.seed, second.max_tokens) == (0.0, 5, -7, 9)


async def test_max_completion_tokens_wins(door):
    await door.chat(max_tokens=3, max_completion_tokens=5)
    assert door.backend.submissions[0].sampling.max_tokens == 5


async def test_a_long_prompt_is_encoded_off_the_loop_to_the_same_ids(make):
    model = dataclasses.replace(MODEL, max_model_len=1 << 20)
    door = make(backend=EchoBackend(served=(model,), piece=1 << 20))
    text = "snow ☃ " * 9000
    answer = await door.complete(text, max_tokens=1 << 17)
    assert answer.json()["choices"][0]["text"] == text


# --- errors

ERRORS = [
    ({"prompt": ""}, 400, "invalid_value", "prompt"),
    ({"prompt": []}, 400, "invalid_value", "prompt"),
    ({"prompt": [[]]}, 400, "invalid_value", "prompt"),
    ({"prompt": ["a", [1]]}, 400, "invalid_type", "prompt"),
    ({"prompt": ["a"] * 65}, 400, "invalid_value", "prompt"),
    ({"prompt": [300]}, 400, "invalid_value", "prompt"),
    ({"prompt": [-1]}, 400, "invalid_value", "prompt"),
    ({"prompt": "x" * 256}, 400, "context_length_exceeded", "prompt"),
    ({"max_tokens": 256}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": -(2**70)}, 400, "invalid_value", "max_tokens"),
    ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
    ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
    ({"top_p": 0}, 400, "invalid_value", "top_p"),
    ({"top_k": 0}, 400, "invalid_value", "top_k"),
    ({"min_p": 1.5}, 400, "invalid_value", "min_p"),
    ({"seed": 2**63}, 400, "invalid_value", "seed"),
    ({"stop": ""}, 400, "invalid_value", "stop"),
    ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
    ({"stop": "x" * 65}, 400, "invalid_value", "stop"),
    ({"stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, 400, "invalid_value", "stop_token_ids"),
    ({"user": "x" * 129}, 400, "invalid_value", "user"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"n": 2}, 400, "unsupported_value", "n"),
    ({"best_of": 2}, 400, "unsupported_value", "best_of"),
    ({"logprobs": 0}, 400, "unsupported_value", "logprobs"),
    ({"echo": True}, 400, "unsupported_value", "echo"),
    ({"presence_penalty": 0.1}, 400, "unsupported_value", "presence_penalty"),
    ({"frequency_penalty": 0.1}, 400, "unsupported_value", "frequency_penalty"),
    ({"repetition_penalty": 1.1}, 400, "unsupported_value", "repetition_penalty"),
    ({"logit_bias": {"1": 1}}, 400, "unsupported_value", "logit_bias"),
    ({"beam_width": 2}, 400, "unsupported_value", "beam_width"),
    (
        {"response_format": {"type": "json_object"}},
        400,
        "unsupported_value",
        "response_format.type",
    ),
]
CHAT_ERRORS = [
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [USER] * 1025}, 400, "invalid_value", "messages"),
    ({"messages": [{**USER, "role": "god"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    (
        {"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "unsupported_value",
        "messages[1].content[0]",
    ),
    ({"messages": [{**USER, "content": "x" * 300}]}, 400, "context_length_exceeded", "messages"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_field", "tools"),
    ({"tool_choice": "required"}, 400, "unsupported_value", "tool_choice"),
    ({"tool_choice": {"type": "function"}}, 400, "unsupported_value", "tool_choice"),
    ({"logprobs": True}, 400, "unsupported_value", "logprobs"),
    ({"top_logprobs": 3}, 400, "unsupported_value", "top_logprobs"),
    ({"modalities": ["audio"]}, 400, "unsupported_value", "modalities"),
    ({"functions": []}, 400, "unsupported_field", "functions"),
    ({"chat_template": "{{ 1 }}"}, 400, "unsupported_field", "chat_template"),
    (
        {"chat_template_kwargs": {"messages": []}},
        400,
        "unsupported_field",
        "chat_template_kwargs.messages",
    ),
]


def check_error(answer, status, code, param):
    assert answer.status == status, answer.body
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("fields", "status", "code", "param"), ERRORS)
async def test_a_wrong_completion_gets_its_code(door, fields, status, code, param):
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "x", "stream": stream, **fields}
        if "stream_options" in fields:
            body["stream"] = False
        check_error(await door.ask("POST", "/v1/completions", body), status, code, param)
    assert door.backend.submissions == []


@pytest.mark.parametrize(("fields", "status", "code", "param"), CHAT_ERRORS)
async def test_a_wrong_chat_gets_its_code(door, fields, status, code, param):
    body = {"model": "tiny", "messages": [USER], **fields}
    check_error(await door.ask("POST", "/v1/chat/completions", body), status, code, param)
    assert door.backend.submissions == []


async def test_neutral_values_of_unbuilt_features_pass(door):
    both = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "beam_width": 1,
    }
    assert (await door.complete("x", echo=False, logprobs=None, **both)).status == 200
    chat = {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none"}
    assert (await door.chat("x", **chat, modalities=["text"], **both)).status == 200


async def test_unknown_fields_are_stripped_and_counted(door):
    answer = await door.complete("x", routing={"to": "evil"}, token_ids=[9], store=True)
    assert answer.status == 200
    assert door.metric("xllm_ignored_fields_total") == 3


async def test_a_folder_without_template_refuses_chats_only(model_folder):
    door = make_door(model_folder)
    check_error(await door.chat(), 400, "unsupported_field", "messages")
    assert (await door.complete("x")).status == 200
    await door.app.close()


async def test_no_model_at_all_is_503_with_retry_after(make):
    state = Readiness(ready=False, reasons=("no_card",))
    door = make(backend=EchoBackend(served=(), state=state))
    answer = await door.complete("x")
    check_error(answer, 503, "no_instances", None)
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


# --- deadline, limit, drain


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


# --- the client leaves


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["abcdef", ["abcdef", "ghijkl"]])
@pytest.mark.parametrize("hold_at", [0, 3])
async def test_a_client_that_leaves_closes_the_generators_at_once(make, stream, prompt, hold_at):
    door = make(backend=EchoBackend(hold_at=hold_at))
    body = {"model": "tiny", "prompt": prompt, "stream": stream}
    call = door.call("POST", "/v1/completions", body)
    num = len(prompt) if isinstance(prompt, list) else 1
    await door.backend.until(
        lambda: door.backend.num_tokens == hold_at * num and door.backend.num_open == num,
        "every generator to wait",
    )
    call.leave()
    answer = await call.done()
    assert not answer.complete
    assert len(door.backend.closed_early) == num
    assert door.metric('xllm_requests_total{code="499"}') == 1
    assert not call.task.cancelled()


async def test_a_client_that_leaves_while_it_does_not_read_closes_the_generator(make):
    door = make(backend=EchoBackend(say=lambda _: (65,) * 200))
    call = door.call("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "stream": True})
    call.hold_sends.clear()
    await door.backend.until(lambda: door.backend.num_open == 1, "a generator")
    call.leave()
    await call.done()
    assert len(door.backend.closed_early) == 1


async def test_a_client_that_leaves_while_sending_its_body_reaches_no_backend(make):
    door = make()
    call = door.call("POST", "/v1/completions", {}, pieces=[])
    call.leave()
    await call.done()
    assert door.backend.submissions == []
    assert door.metric('xllm_requests_total{code="499"}') == 1


async def test_a_client_that_leaves_while_its_prompt_is_encoded_reaches_no_backend(make):
    door = make()
    call = door.call("POST", "/v1/chat/completions", {"model": "tiny", "messages": [USER]})
    call.leave()
    await call.done()
    assert door.backend.num_open == 0
    assert door.metric('xllm_requests_total{code="499"}') == 1


async def test_a_slow_reader_is_paused_not_buffered(make):
    door = make(backend=EchoBackend(say=lambda _: (65,) * 200))
    call = door.call("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "stream": True})
    call.hold_sends.clear()
    await door.backend.until(lambda: door.backend.num_open == 1, "a generator")
    for _ in range(100):
        await asyncio.sleep(0)
    assert door.backend.num_tokens <= 2
    call.hold_sends.set()
    assert len((await call.done()).text()) == 200


async def test_a_slow_reader_is_cut_at_its_deadline(make):
    door = make(backend=EchoBackend(say=lambda _: (65,) * 200))
    aborted = asyncio.Event()
    call = door.call(
        "POST",
        "/v1/completions",
        {"model": "tiny", "prompt": "a", "stream": True},
        headers={"x-request-timeout": "0.05"},
    )
    call.scope["extensions"] = {"xllm.abort": aborted.set}
    call.hold_sends.clear()
    await call.done()
    assert aborted.is_set()
    assert len(door.backend.closed_early) == 1


async def test_silence_is_filled_with_comments(make):
    door = make(backend=EchoBackend(hold_at=1), keepalive_s=0.02)
    call = door.call("POST", "/v1/completions", {"model": "tiny", "prompt": "ab", "stream": True})
    await door.backend.until(lambda: call.answer.body.count(b": still here\n\n") >= 3, "comments")
    door.backend.release.set()
    answer = await call.done()
    assert answer.text() == "ab"
    assert answer.events[-1] == "[DONE]"


async def test_no_comment_goes_out_before_the_first_token(make):
    door = make(backend=EchoBackend(hold_at=0), keepalive_s=0.01)
    call = door.call("POST", "/v1/completions", {"model": "tiny", "prompt": "ab", "stream": True})
    await asyncio.sleep(0.05)
    assert call.answer.sends == 0
    door.backend.release.set()
    assert (await call.done()).text() == "ab"


# --- plain routes


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


async def test_two_hundred_streams_at_once_all_end(make):
    door = make()
    body = {"model": "tiny", "stream": True}
    calls = [
        door.call("POST", "/v1/completions", {**body, "prompt": f"stream ☃ {index}"})
        for index in range(200)
    ]
    answers = [await call.done() for call in calls]
    assert [answer.text() for answer in answers] == [f"stream ☃ {index}" for index in range(200)]
    assert all(answer.events[-1] == "[DONE]" for answer in answers)
