"""The two ends of the control services against each other, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from grpc import aio

from xllm_py.base.errors import (
    InvalidApiKey,
    LayoutMismatch,
    PeerUnavailable,
    PortInUse,
    ProtocolViolation,
    QueueFull,
    RequestNotFound,
    StaleIncarnation,
)
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.load import Load, Progress
from xllm_py.control import convert, methods, proof
from xllm_py.control.bounds import MAX_SUBMISSIONS
from xllm_py.control.channels import Channels
from xllm_py.control.client import GenerationsStream, InstanceClient, MasterClient
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.control.server import ControlServer, serve_instance, serve_master
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Receiver, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.wire.control_messages import (
    GenerationsDown,
    GenerationsUp,
    Heartbeat,
    HeartbeatReply,
    LinkHealth,
    LinkState,
    Positions,
)

KEY = b"k" * 32
SUBMISSION = Submission(
    request_id="cmpl-1",
    attempt=2,
    prompt_ids=(1, 2, 151_935),
    generated_ids=(7,),
    sampling=SamplingParams(
        max_tokens=5, seed=-3, temperature=0.7, top_k=4, stop=("é",), stop_token_ids=(9,)
    ),
    timeout_s=12.5,
    receiver=Receiver(name="d", address="127.0.0.1:1", incarnation="dd"),
    master="127.0.0.1:2",
    relay=True,
    model="m",
)
OFFER = Offer(
    submission=SUBMISSION,
    giver_name="p",
    giver_address="127.0.0.1:3",
    giver_incarnation="pp",
    model_fingerprint="m",
    layout_fingerprint="l",
    block_size=4,
    read_grant=b"r" * 16,
)
ANSWER = OfferAnswer(
    request_id="cmpl-1",
    attempt=2,
    grant=b"g" * 16,
    num_held_blocks=1,
    num_blocks=3,
    endpoints=("127.0.0.1:4",),
    stream=2,
    expires_s=30.0,
)


class ScriptedInstance:
    """Notes what it is asked and answers what the test says."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.error: Exception | None = None
        self.streams_ended = asyncio.Event()

    def _note(self, *what: Any) -> None:
        self.seen.append(what)
        if self.error is not None:
            raise self.error

    async def submit(self, submission: Submission) -> None:
        self._note(submission)

    async def add_new_requests(self, offers: list[Offer]) -> list[OfferAnswer]:
        self._note(*offers)
        return [ANSWER for _ in offers]

    async def first_generation(self, firsts: list[FirstToken]) -> list[bool]:
        self._note(*firsts)
        return [first.grant == ANSWER.grant for first in firsts]

    async def link_instance(self, card_json: bytes) -> None:
        self._note(card_json)

    async def probe_peer(self, card_json: bytes, fetch: bool) -> LinkHealth:
        self._note(card_json, fetch)
        return LinkHealth(works=True, round_trip_s=0.25, bytes_per_s=1e9)

    async def unlink_instance(self, name: str, incarnation: str) -> None:
        self._note(name, incarnation)

    async def cancel(self, request_ids: list[str], attempts: list[int], reason: str) -> list[str]:
        self._note(request_ids, attempts, reason)
        return ["running" for _ in request_ids]

    async def drain(self, mode: str, timeout_s: float) -> int:
        self._note(mode, timeout_s)
        return 3

    async def describe(self, stream_id: str) -> dict[str, Any]:
        self._note(stream_id)
        return {"state": "READY"}

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        self._note(beat)
        return HeartbeatReply(known=False)

    async def get_instance_info(self, name: str) -> bytes:
        self._note(name)
        return b"{}"

    async def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        try:
            async for up in ups:
                self._note(up)
                acks = Positions()
                for index, request_id in enumerate(up.outputs.request_ids):
                    acks.add(request_id, 1, 0, up.outputs.positions[index] + 1)
                yield GenerationsDown(acks=acks)
        finally:
            self.streams_ended.set()


@contextlib.asynccontextmanager
async def instance_server(
    handlers: ScriptedInstance, *, port: int = 0, may_move: bool = False
) -> AsyncIterator[ControlServer]:
    server = await serve_instance(
        handlers,
        host="127.0.0.1",
        port=port,
        may_move=may_move,
        cluster_key=KEY,
        incarnation="here",
    )
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def instance() -> AsyncIterator[tuple[ScriptedInstance, InstanceClient]]:
    handlers = ScriptedInstance()
    async with instance_server(handlers) as server:
        client = InstanceClient(
            server.address, cluster_key=KEY, sender="me", addressee="here", timeout_s=5.0
        )
        try:
            yield handlers, client
        finally:
            await client.close()


async def submit(client: InstanceClient) -> None:
    (refusal,) = await client.submit([SUBMISSION])
    if refusal is not None:
        raise refusal


async def test_each_of_many_submissions_is_accepted_or_refused_by_itself() -> None:
    class Choosy(ScriptedInstance):
        async def submit(self, submission: Submission) -> None:
            await super().submit(submission)
            if submission.request_id == "second":
                raise QueueFull("the queue is full", retry_after_s=1.5)

    handlers = Choosy()
    sent = [
        dataclasses.replace(SUBMISSION, request_id=name) for name in ("first", "second", "third")
    ]
    async with instance_server(handlers) as server:
        client = InstanceClient(server.address, cluster_key=KEY, sender="me", timeout_s=5.0)
        first, second, third = await client.submit(sent)
        assert first is third is None
        assert isinstance(second, QueueFull)
        assert second.retry_after_s == 1.5
        assert handlers.seen == [(each,) for each in sent]
        for count in (0, MAX_SUBMISSIONS + 1):
            with pytest.raises(ProtocolViolation, match=f"{count} submissions"):
                await client.submit([SUBMISSION] * count)
        await client.close()


async def test_a_submission_arrives_as_it_was_sent() -> None:
    async with instance() as (handlers, client):
        await submit(client)
        assert handlers.seen == [(SUBMISSION,)]


async def test_offers_first_tokens_and_the_rest_keep_their_values() -> None:
    first = FirstToken(
        request_id="cmpl-1", attempt=2, grant=b"g" * 16, token_ids=(3,), cached_tokens=64
    )
    other = FirstToken(request_id="cmpl-2", attempt=1, grant=b"x" * 16, token_ids=(3,))
    async with instance() as (handlers, client):
        assert await client.add_new_requests([OFFER]) == [ANSWER]
        assert await client.first_generation([first, other]) == [True, False]
        await client.link_instance(b'{"a":1}')
        health = LinkHealth(works=True, round_trip_s=0.25, bytes_per_s=1e9)
        assert await client.probe_peer(b'{"b":2}') == health
        assert await client.probe_peer(b'{"c":3}', fetch=True) == health
        await client.unlink_instance("p", "pp")
        assert await client.cancel(["a", "b"], [1, 0], "deadline") == ["running", "running"]
        assert await client.drain("finish", 2.0) == 3
        assert await client.describe() == await client.describe("cmpl-1") == {"state": "READY"}
        assert handlers.seen == [
            (OFFER,),
            (first, other),
            (b'{"a":1}',),
            (b'{"b":2}', False),
            (b'{"c":3}', True),
            ("p", "pp"),
            (["a", "b"], [1, 0], "deadline"),
            ("finish", 2.0),
            ("",),
            ("cmpl-1",),
        ]


async def test_a_refusal_is_rebuilt_as_the_same_leaf() -> None:
    async with instance() as (handlers, client):
        handlers.error = QueueFull("the queue is full", param="model", retry_after_s=1.5)
        with pytest.raises(QueueFull) as caught:
            await submit(client)
        assert caught.value.message == "the queue is full"
        assert (caught.value.param, caught.value.retry_after_s) == ("model", 1.5)
        handlers.error = LayoutMismatch("block_size: 16 here, 32 there")
        with pytest.raises(LayoutMismatch, match="16 here, 32 there"):
            await client.link_instance(b"{}")


async def test_an_unforeseen_error_ends_only_its_call_and_hides_its_text() -> None:
    async with instance() as (handlers, client):
        handlers.error = ZeroDivisionError("a secret")
        with pytest.raises(Exception, match="failed inside this process") as caught:
            await submit(client)
        assert "secret" not in str(caught.value)
        handlers.error = None
        await submit(client)


async def test_another_cluster_key_is_unauthenticated() -> None:
    handlers = ScriptedInstance()
    async with instance_server(handlers) as server:
        client = InstanceClient(
            server.address, cluster_key=b"x" * 32, sender="me", addressee="here", timeout_s=5.0
        )
        with pytest.raises(InvalidApiKey):
            await submit(client)
        await client.close()
        assert handlers.seen == []


async def test_another_life_at_the_address_refuses() -> None:
    handlers = ScriptedInstance()
    async with instance_server(handlers) as server:
        client = InstanceClient(
            server.address, cluster_key=KEY, sender="me", addressee="before", timeout_s=5.0
        )
        with pytest.raises(StaleIncarnation):
            await submit(client)
        await client.close()
        assert handlers.seen == []


async def _status_of(call: Awaitable[Any]) -> grpc.StatusCode:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_a_call_without_deadline_proof_or_sense_is_refused() -> None:
    handlers = ScriptedInstance()
    path = f"/{methods.INSTANCE}/Submit"
    proven = proof.metadata(proof.control_key(KEY), method=path, sender="me", addressee="")
    elsewhere = proof.metadata(proof.control_key(KEY), method="/x/Drain", sender="me", addressee="")
    empty = pb.SubmitRequest().SerializeToString()
    async with (
        instance_server(handlers) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        call = channel.unary_unary(path)
        code = grpc.StatusCode
        good = pb.SubmitRequest(
            submissions=[convert.from_submission(SUBMISSION)]
        ).SerializeToString()
        assert await _status_of(call(good, metadata=proven)) is code.INVALID_ARGUMENT
        assert await _status_of(call(empty, timeout=5)) is code.UNAUTHENTICATED
        assert await _status_of(call(empty, timeout=5, metadata=elsewhere)) is code.UNAUTHENTICATED
        assert (
            await _status_of(call(b"\xff\xff", timeout=5, metadata=proven)) is code.INVALID_ARGUMENT
        )
        assert await _status_of(call(empty, timeout=5, metadata=proven)) is code.INVALID_ARGUMENT
        hello = channel.unary_unary(f"/{methods.INSTANCE}/Hello")
        assert await _status_of(hello(b"", timeout=5)) is code.UNIMPLEMENTED
        assert handlers.seen == []
        await call(good, timeout=5, metadata=proven)
        assert handlers.seen == [(SUBMISSION,)]


async def test_nobody_at_the_address_is_peer_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = InstanceClient(f"127.0.0.1:{port}", cluster_key=KEY, sender="me", timeout_s=5.0)
    with pytest.raises(PeerUnavailable):
        await submit(client)
    await client.close()


async def test_an_answer_that_never_comes_is_peer_unavailable() -> None:
    class Silent(ScriptedInstance):
        async def submit(self, submission: Submission) -> None:
            await asyncio.sleep(60)

    async with instance_server(Silent()) as server:
        client = InstanceClient(server.address, cluster_key=KEY, sender="me", timeout_s=0.1)
        with pytest.raises(PeerUnavailable):
            await submit(client)
        await client.close()


async def test_a_busy_port_is_an_error_or_the_next_one_is_taken() -> None:
    async with instance_server(ScriptedInstance()) as first:
        with pytest.raises(PortInUse, match=str(first.port)):
            async with instance_server(ScriptedInstance(), port=first.port):
                pass
        async with instance_server(ScriptedInstance(), port=first.port, may_move=True) as second:
            assert second.port > first.port


def an_up() -> GenerationsUp:
    outputs = Outputs(step=4)
    outputs.add("a", 1, position=0, token_id=5)
    last = outputs.add("b", 2, choice=1, position=3, token_id=-1, finish_reason="queue_full")
    outputs.messages[last] = "full"
    outputs.cached_tokens[0] = 16
    outputs.journeys[last] = {"received": 0.0, "admitted": 0.25}
    return GenerationsUp(name="d", incarnation="dd", sequence=1, outputs=outputs)


async def master_server(handlers: ScriptedInstance) -> ControlServer:
    return await serve_master(
        handlers, host="127.0.0.1", port=0, may_move=False, cluster_key=KEY, incarnation="here"
    )


@pytest.mark.parametrize("target", ["master", "instance"])
async def test_a_stream_carries_columns_up_and_acknowledgements_down(target: Any) -> None:
    handlers = ScriptedInstance()
    server = await (
        master_server(handlers)
        if target == "master"
        else serve_instance(
            handlers,
            host="127.0.0.1",
            port=0,
            may_move=False,
            cluster_key=KEY,
            incarnation="here",
        )
    )
    stream = GenerationsStream(server.address, target, cluster_key=KEY, sender="me")
    await stream.send(an_up())
    down = await anext(aiter(stream))
    assert handlers.seen == [(an_up(),)]
    assert (down.acks.request_ids, down.acks.nexts) == (["a", "b"], [1, 4])
    await stream.close()
    async with asyncio.timeout(5):
        await handlers.streams_ended.wait()
    await server.close()


async def test_a_stream_whose_server_leaves_raises_on_both_sides() -> None:
    handlers = ScriptedInstance()
    server = await master_server(handlers)
    stream = GenerationsStream(server.address, "master", cluster_key=KEY, sender="me")
    await stream.send(an_up())
    downs = aiter(stream)
    await anext(downs)
    await server.close()
    assert handlers.streams_ended.is_set()
    with pytest.raises(PeerUnavailable):
        await anext(downs)
    with pytest.raises(PeerUnavailable):
        await stream.send(an_up())
    await stream.close()


async def test_a_stream_to_nobody_raises() -> None:
    stream = GenerationsStream("127.0.0.1:1", "master", cluster_key=KEY, sender="me")
    with pytest.raises(PeerUnavailable):
        await anext(aiter(stream))
    await stream.close()


async def test_a_stream_that_is_not_let_in_says_why() -> None:
    handlers = ScriptedInstance()
    server = await master_server(handlers)
    stream = GenerationsStream(server.address, "master", cluster_key=b"x" * 32, sender="me")
    with pytest.raises(InvalidApiKey):
        for _ in range(100):  # the first ones may leave before the refusal comes
            await stream.send(an_up())
            await asyncio.sleep(0.01)
    with pytest.raises(InvalidApiKey):
        await anext(aiter(stream))
    await stream.close()
    await server.close()
    assert handlers.seen == []


async def test_heartbeats_and_cards_of_others() -> None:
    handlers = ScriptedInstance()
    server = await master_server(handlers)
    client = MasterClient(server.address, cluster_key=KEY, sender="me", timeout_s=5.0)
    beat = Heartbeat(
        name="d",
        incarnation="dd",
        sequence=9,
        state="READY",
        role=Role.DECODE,
        load=Load(waiting_requests=1, total_blocks=8, free_blocks=2),
        progress=Progress(steps=4, announced_s=0.5),
        links=(LinkState(peer="p", incarnation="pp", linked=False, reason="dtype"),),
    )
    assert await client.heartbeat(beat) == HeartbeatReply(known=False)
    assert await client.get_instance_info("d") == b"{}"
    assert handlers.seen == [(beat,), ("d",)]
    handlers.error = RequestNotFound("no such instance")
    with pytest.raises(RequestNotFound):
        await client.get_instance_info("x")
    await client.close()
    await server.close()


async def test_clients_of_one_address_share_a_channel() -> None:
    channels = Channels()
    try:
        assert channels.get("127.0.0.1:1") is channels.get("127.0.0.1:1")
        assert channels.get("127.0.0.1:1") is not channels.get("127.0.0.1:2")
    finally:
        await channels.close()


async def test_hundreds_of_calls_at_once_all_end_well() -> None:
    async with instance() as (handlers, client):
        await asyncio.gather(*(submit(client) for _ in range(1500)))
        assert len(handlers.seen) == 1500


def test_every_method_of_the_contract_is_served() -> None:
    from xllm_py.control import server as module

    guard = module._Guard("s", KEY, "i")
    services = pb.DESCRIPTOR.services_by_name
    handlers: Any = ScriptedInstance()
    assert set(module._instance_table(guard, handlers)) == {
        method.name for method in services["DisaggPDService"].methods
    }
    assert set(module._master_table(guard, handlers)) == {
        method.name for method in services["XllmRpcService"].methods
    }
