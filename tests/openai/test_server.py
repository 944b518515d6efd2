"""The door over a real socket: the openai client, raw HTTP, limits, disconnects, shutdown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct

import openai
import pytest

from tests.openai.support import EchoBackend
from xllm_py.base.errors import PortInUse, UsageError
from xllm_py.openai.server import serve_http


@pytest.fixture
async def serve(make):
    """Starts servers over doors of their own."""
    servers = []

    async def start(backend=None, **settings):
        door = make(backend=backend or EchoBackend(), **settings)
        server = await serve_http(door.app, "127.0.0.1", 0)
        servers.append(server)
        return door, server

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def client(serve):
    _, server = await serve()
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


def post(body, *, path="/v1/completions", headers=""):
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(raw)}\r\n{headers}\r\n"
    )
    return head.encode() + raw


async def connect(server):
    return await asyncio.open_connection("127.0.0.1", server.port)


async def exchange(server, data):
    """Send bytes, read until the server closes."""
    reader, writer = await connect(server)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


# --- the openai client


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


async def test_the_openai_client_raises_what_ends_a_stream(serve):
    _, server = await serve(EchoBackend(hold_at=2), request_timeout_s=0.2)
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.completions.create(model="tiny", prompt="abcd", stream=True)
        with pytest.raises(openai.APIError, match="took longer"):
            [chunk async for chunk in stream]


# --- raw HTTP


async def test_one_connection_serves_many_requests(serve):
    _, server = await serve()
    reader, writer = await connect(server)
    for text in ("one", "two"):
        writer.write(post({"model": "tiny", "prompt": text}))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        assert body["choices"][0]["text"] == text
    writer.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 17000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 64 + b"\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n", b"400"),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"400",
        ),
        (
            post({"model": "tiny", "prompt": "x" * (1 << 20)}, headers="connection: close\r\n"),
            b"413",
        ),
    ],
)
async def test_what_is_too_large_or_no_http_gets_an_error_object_and_the_door(serve, data, status):
    _, server = await serve()
    answer = await exchange(server, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


UPGRADE = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEA\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cut", [0, 40, 200, 260, 275])
async def test_an_upgrade_that_is_offered_is_ignored_and_the_body_read(serve, chunked, cut):
    """Java's client offers h2c with its first request; the bytes behind the head are its body, never a request."""
    _, server = await serve()
    offer = post({"model": "tiny", "prompt": "GET /version HTTP/1.1\r\n\r\n"}, headers=UPGRADE)
    if chunked:
        head, _, body = offer.partition(b"\r\n\r\n")
        head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
        offer = head + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    reader, writer = await connect(server)
    writer.write(offer[:cut])
    for _ in range(5):
        await asyncio.sleep(0)  # the server reads what there is
    get = f"GET /health HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\n".encode()
    writer.write(offer[cut:] + get)
    last = post({"model": "tiny", "prompt": "abc"}, headers="connection: close\r\n")
    writer.write(last)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"HTTP/1.1 ") == 3
    assert b'"healthy"' in answer
    assert b'"text":"abc"' in answer


async def test_an_endless_header_is_cut_off(serve):
    _, server = await serve()
    reader, writer = await connect(server)
    writer.write(b"GET / HTTP/1.1\r\na: " + b"x" * 20000)
    await writer.drain()
    writer.write(b"x" * 200_000)
    assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 431")
    writer.close()


async def test_headers_that_do_not_come_are_408(serve):
    _, server = await serve(read_timeout_s=0.1)
    assert (await exchange(server, b"GET / HT")).startswith(b"HTTP/1.1 408")
    assert (await exchange(server, b"")).startswith(b"HTTP/1.1 408")


async def test_an_unwanted_body_is_answered_before_it_has_all_come(serve):
    _, server = await serve(max_body_bytes=10)
    reader, writer = await connect(server)
    writer.write(post({"model": "tiny", "prompt": "abc"})[:-5])
    assert b"body_too_large" in await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    writer.write(b"abcd}" + b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b"healthy" in await asyncio.wait_for(reader.readuntil(b"}"), 10)
    writer.close()


async def test_one_connection_too_many_is_refused(serve):
    _, server = await serve(max_connections=1)
    _, first = await connect(server)
    assert (await exchange(server, b"")).startswith(b"HTTP/1.1 429")
    first.close()


async def test_slow_headers_behind_a_stream_do_not_disturb_it(serve):
    door, server = await serve(EchoBackend(hold_at=1), read_timeout_s=0.1)
    reader, writer = await connect(server)
    writer.write(post({"model": "tiny", "prompt": "ab", "stream": True}))
    await reader.readuntil(b"\n\n")
    writer.write(b"GET / HT")
    await asyncio.sleep(0.2)
    door.backend.release.set()
    rest = await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n"), 10)
    assert b"408" not in rest
    writer.close()


# --- disconnects


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 2])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_dropped_connection_closes_the_generator(serve, stream, hold_at, reset):
    door, server = await serve(EchoBackend(hold_at=hold_at))
    _, writer = await connect(server)
    writer.write(post({"model": "tiny", "prompt": "abcd", "stream": stream}))
    await door.backend.until(
        lambda: door.backend.num_open == 1 and door.backend.num_tokens == hold_at,
        "the generator to wait",
    )
    if reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    await door.backend.until(lambda: door.backend.closed_early, "the generator to be closed")
    await door.backend.until(lambda: door.app.num_open == 0, "the request to end")


async def test_a_client_that_reads_nothing_pauses_its_backend_and_ends_at_its_deadline(serve):
    backend = EchoBackend(say=lambda _: (65,) * 40_000)
    model = backend.served[0]
    backend.served = (dataclasses.replace(model, max_model_len=1 << 20),)
    door, server = await serve(backend, slow_reader_bytes=16 << 10)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    body = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 40_000}
    sock.sendall(post(body, headers="x-request-timeout: 1.5\r\n"))
    await door.backend.until(lambda: door.backend.closed_early, "the deadline")
    assert door.backend.num_tokens < 39_000
    await door.backend.until(lambda: server.num_connections == 0, "the connection to be cut")
    sock.close()


# --- life


async def test_a_taken_port_is_named(serve):
    door, server = await serve()
    with pytest.raises(PortInUse, match=str(server.port)):
        await serve_http(door.app, "127.0.0.1", server.port)


async def test_a_host_that_is_not_ours_is_named(serve):
    door, _ = await serve()
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(UsageError, match=host):
            await serve_http(door.app, host, 0)


async def test_closing_ends_streams_with_an_error_event_and_frees_the_port(serve):
    _, server = await serve(EchoBackend(hold_at=1))
    reader, writer = await connect(server)
    writer.write(post({"model": "tiny", "prompt": "abcd", "stream": True}))
    first = await reader.readuntil(b"\n\n")
    await server.close()
    rest = await asyncio.wait_for(reader.read(), 10)
    assert b'"code":"draining"' in rest
    assert b"[DONE]" not in first + rest
    with pytest.raises(ConnectionRefusedError):
        await connect(server)
    writer.close()


async def test_idle_connections_do_not_hold_up_the_end(serve):
    _, server = await serve()
    reader, writer = await connect(server)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await reader.readuntil(b"healthy")
    await server.close()
    assert server.num_connections == 0
    writer.close()


async def test_two_hundred_streams_over_sockets_all_end(serve):
    door, server = await serve()

    async def one(index):
        body = {"model": "tiny", "prompt": f"stream ☃ {index}", "stream": True}
        answer = await exchange(server, post(body, headers="connection: close\r\n"))
        return answer.count(b"[DONE]")

    assert sum(await asyncio.gather(*[one(index) for index in range(200)])) == 200
    assert door.app.num_open == 0
    await door.backend.until(lambda: server.num_connections == 0, "connections to close")
