"""Every wrong request body gets its status, code and path before any backend hears of it."""

from __future__ import annotations

import pytest

from tests.openai.support import check_error, make_door

USER = {"role": "user", "content": "hi"}


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
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": -1}, 400, "invalid_value", "n"),
    ({"n": 9}, 400, "invalid_value", "n"),
    ({"n": 9, "best_of": 9}, 400, "invalid_value", "n"),
    ({"best_of": 0}, 400, "invalid_value", "best_of"),
    ({"best_of": 9}, 400, "invalid_value", "best_of"),
    ({"n": 3, "best_of": 2}, 400, "invalid_value", "best_of"),
    ({"logprobs": -1}, 400, "invalid_value", "logprobs"),
    ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
    ({"logprobs": True}, 400, "invalid_type", "logprobs"),
    ({"prompt_logprobs": -1}, 400, "invalid_value", "prompt_logprobs"),
    ({"prompt_logprobs": 21}, 400, "invalid_value", "prompt_logprobs"),
    ({"presence_penalty": 2.1}, 400, "invalid_value", "presence_penalty"),
    ({"presence_penalty": -2.1}, 400, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": 2.1}, 400, "invalid_value", "frequency_penalty"),
    ({"frequency_penalty": -2.1}, 400, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    ({"repetition_penalty": 2.1}, 400, "invalid_value", "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": -101}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"300": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"01": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"a": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"\u0662": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": "1"}}, 400, "invalid_type", "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, 400, "invalid_value", "logit_bias"),
    ({"min_tokens": -1}, 400, "invalid_value", "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, 400, "invalid_value", "min_tokens"),
    ({"priority": 4}, 400, "invalid_value", "priority"),
    ({"priority": -1}, 400, "invalid_value", "priority"),
    ({"offline": 1}, 400, "invalid_type", "offline"),
    ({"ttft_slo_ms": -1}, 400, "invalid_value", "ttft_slo_ms"),
    ({"tpot_slo_ms": -0.5}, 400, "invalid_value", "tpot_slo_ms"),
    ({"beam_width": 2}, 400, "unsupported_value", "beam_width"),
    (
        {"response_format": {"type": "xml"}},
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
    ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": 1}, 400, "invalid_type", "logprobs"),
    ({"n": 9}, 400, "invalid_value", "n"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "invalid_value", "prompt_logprobs"),
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


@pytest.mark.parametrize("arguments", [f'{{"a": {2**70}}}', '{"a": "\\ud800"}'])
async def test_arguments_no_template_can_be_given_are_the_clients_error(door, arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, USER]
    body = {"model": "tiny", "messages": messages}
    answer = await door.ask("POST", "/v1/chat/completions", body)
    check_error(answer, 400, "invalid_value", "messages")
    assert (await door.chat("x")).status == 200


async def test_numbers_no_template_can_be_given_are_the_clients_error(door):
    answer = await door.chat("x", chat_template_kwargs={"a": -(2**70)})
    check_error(answer, 400, "invalid_value", "messages")
    assert (await door.chat("x")).status == 200


async def test_prompt_logprobs_are_not_streamed(door):
    answer = await door.complete("x", prompt_logprobs=0, stream=True)
    check_error(answer, 400, "invalid_value", "prompt_logprobs")


async def test_the_limits_are_the_doors_and_are_named(make):
    door = make(max_best_of=2, max_logprobs=3)
    assert (await door.complete("x", n=2, logprobs=3)).status == 200
    for fields, limit in (({"n": 3}, "2"), ({"best_of": 3}, "2"), ({"logprobs": 4}, "3")):
        answer = await door.complete("x", **fields)
        assert (answer.status, f"{limit}]" in answer.error["message"]) == (400, True)


async def test_a_bad_key_of_logit_bias_is_named(door):
    answer = await door.complete("x", logit_bias={"1": 1, "500": 2})
    assert "'500'" in answer.error["message"]


async def test_fields_reach_the_submission(door):
    await door.complete(
        "abc",
        best_of=4,
        n=2,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"7": 1.5, "3": -100},
        min_tokens=2,
        priority=1,
        offline=True,
        ttft_slo_ms=20,
        tpot_slo_ms=1.5,
    )
    (submission,) = door.backend.submissions
    sampling = submission.sampling
    assert (sampling.best_of, sampling.logprobs, sampling.prompt_logprobs) == (4, 0, -1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.5, 2)
    assert sampling.logit_bias == ((3, -100.0), (7, 1.5))
    assert (submission.priority, submission.offline) == (1, True)
    assert (submission.ttft_slo_ms, submission.tpot_slo_ms) == (20.0, 1.5)


@pytest.mark.parametrize(
    ("fields", "logprobs", "prompt_logprobs"),
    [
        ({}, -1, -1),
        ({"logprobs": 0}, 0, -1),
        ({"logprobs": 5, "best_of": 2}, 5, -1),
        ({"best_of": 2, "n": 2}, -1, -1),
        ({"echo": True}, -1, -1),
        ({"echo": True, "best_of": 2}, 0, -1),
        ({"echo": True, "logprobs": 2}, 2, 2),
        ({"prompt_logprobs": 3}, -1, 3),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 2}, 2, 2),
    ],
)
async def test_engines_are_asked_for_the_logprobs_that_are_needed(
    door, fields, logprobs, prompt_logprobs
):
    assert (await door.complete("abc", **fields)).status == 200
    sampling = door.backend.submissions[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


async def test_neutral_values_pass(door):
    both = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "min_tokens": 0,
        "priority": 0,
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
