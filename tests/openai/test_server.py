"""The door over a real socket: the openai client, raw HTTP, limits, disconnects, shutdown."""

from __future__ import annotations

import openai
import pytest

from xllm_py.base.errors import PortInUse
from xllm_py.openai.server import serve_http
from xllm_py.openai.settings import HttpSettings


@pytest.fixture
async def served(door):
    server = await serve_http(door.app, "127.0.0.1", 0, settings=HttpSettings())
    yield door, server
    await server.close()


@pytest.fixture
async def client(served):
    _, server = served
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def test_the_openai_client_reads_completions_both_ways(client):
    whole = await client.completions.create(model="tiny", prompt="héllo ☃")
    assert whole.choices[0].text == "héllo ☃"
    stream = await client.completions.create(
        model="tiny", prompt="héllo ☃", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "héllo ☃"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_the_openai_client_reads_chats_both_ways(client):
    messages = [{"role": "user", "content": "☃"}]
    whole = await client.chat.completions.create(model="tiny", messages=messages)
    assert whole.choices[0].message.content == "user\n☃\nassistant\n"
    stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


async def test_the_openai_client_maps_our_errors_to_its_own(client):
    with pytest.raises(openai.NotFoundError) as found:
        await client.completions.create(model="other", prompt="x")
    assert found.value.code == "model_not_found"
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny"]


async def test_a_taken_port_is_named(served):
    door, server = served
    with pytest.raises(PortInUse, match=str(server.port)):
        await serve_http(door.app, "127.0.0.1", server.port, settings=HttpSettings())
