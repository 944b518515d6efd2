"""Completions and chats over an echo backend: text, usage, streams, several prompts."""

from __future__ import annotations

import dataclasses

import pytest

from tests.openai.support import MODEL, EchoBackend


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
