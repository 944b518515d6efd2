"""Clients that leave in any phase, clients that do not read, silence."""

from __future__ import annotations

import asyncio

import pytest

from tests.openai.support import EchoBackend

USER = {"role": "user", "content": "hi"}


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
