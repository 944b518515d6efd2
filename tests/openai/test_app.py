"""The routes over an echo backend: what a client gets for what it sends."""

from __future__ import annotations


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
    assert body["model"] == "tiny" and body["system_fingerprint"] == "fp_1"


async def test_a_chat_is_rendered_by_the_template(door):
    answer = await door.chat("hi", skip_special_tokens=False)
    assert answer.status == 200, answer.body
    message = answer.json()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


async def test_a_chat_stream_has_role_content_finish_usage_and_done(door):
    answer = await door.chat("hi", stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.text() == "user\nhi\nassistant\n"
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] > 0
    assert all(event["usage"] is None for event in events[:-2])
    assert events[-1] == "[DONE]"
