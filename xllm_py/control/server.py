"""The answering side of the control services: ports, the proof of the cluster key, and the one error interceptor.

A daemon gives its handlers, values in and values out. A handler's XllmError becomes a status; anything else becomes INTERNAL and
is logged once; this is one of the four places that catch everything. A call without deadline is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from xllm_py.base import log
from xllm_py.base.errors import (
    InvalidValue,
    ProtocolViolation,
    RequestError,
    UsageError,
    XllmError,
)
from xllm_py.base.ports import port_taken
from xllm_py.control import convert, convert_streams, methods, proof, status
from xllm_py.control.bounds import label
from xllm_py.control.channels import SERVER_OPTIONS
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.control.tls import server_credentials
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.core.service_config import TlsSlice
from xllm_py.wire.control_messages import (
    GenerationsDown,
    GenerationsUp,
    Heartbeat,
    HeartbeatReply,
    LinkHealth,
)

_log = log.get(__name__)
_MOST_PORTS = 100
_STOP_GRACE_S = 0.2

Request = TypeVar("Request", bound=Message)
Context = Any  # grpc.aio.ServicerContext; the stubs know only part of it
MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time


class InstanceHandlers(Protocol):
    """What an instance does when it is called; see InstanceClient for the meaning of each."""

    async def submit(self, submission: Submission) -> None: ...
    async def add_new_requests(self, offers: list[Offer]) -> list[OfferAnswer]: ...
    async def first_generation(self, firsts: list[FirstToken]) -> list[bool]: ...
    async def link_instance(self, card_json: bytes) -> None: ...
    async def probe_peer(self, card_json: bytes, fetch: bool) -> LinkHealth: ...
    async def unlink_instance(self, name: str, incarnation: str) -> None: ...
    async def cancel(
        self, request_ids: list[str], attempts: list[int], reason: str
    ) -> list[str]: ...
    async def drain(self, mode: str, timeout_s: float) -> int: ...
    async def describe(self, stream_id: str) -> dict[str, Any]: ...

    def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        """Relayed mode: D's stream. Cancelled, or `ups` ends, when the caller's connection ends."""
        ...


class MasterHandlers(Protocol):
    """What a master does when it is called; see MasterClient."""

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply: ...
    async def get_instance_info(self, name: str) -> bytes: ...

    def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        """An instance's stream. Cancelled, or `ups` ends, when the instance's connection ends."""
        ...


class ControlServer:
    """A running server; `port` is the real one."""

    def __init__(self, server: aio.Server, host: str, port: int) -> None:
        self._server = server
        self.port = port
        self.address = join_address(host, port)

    async def close(self) -> None:
        """Stop listening; calls still open end after a short grace."""
        await self._server.stop(_STOP_GRACE_S)


async def serve_instance(
    handlers: InstanceHandlers,
    *,
    host: str,
    port: int,
    may_move: bool,
    cluster_key: bytes,
    incarnation: str,
    tls: TlsSlice | None = None,
) -> ControlServer:
    """Serve DisaggPDService. may_move: take the next free port when this one is busy. Raises PortInUse, UsageError."""
    guard = _Guard(methods.INSTANCE, cluster_key, incarnation)
    server = _server(guard, _instance_table(guard, handlers))
    bound = _bind(server, host, port, "--disagg_pd_port", may_move, tls)
    return await _started(server, host, bound)


async def serve_master(
    handlers: MasterHandlers,
    *,
    host: str,
    port: int,
    may_move: bool,
    cluster_key: bytes,
    incarnation: str,
    tls: TlsSlice | None = None,
) -> ControlServer:
    """Serve XllmRpcService; the arguments are serve_instance's."""
    guard = _Guard(methods.MASTER, cluster_key, incarnation)
    server = _server(guard, _master_table(guard, handlers))
    bound = _bind(server, host, port, "--rpc_server_port", may_move, tls)
    return await _started(server, host, bound)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server(guard: _Guard, table: dict[str, MethodHandler]) -> aio.Server:
    server = aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(guard.service, table),))
    return server


async def _started(server: aio.Server, host: str, port: int) -> ControlServer:
    await server.start()
    return ControlServer(server, host, port)


def require_free(host: str, port: int, flag: str) -> None:
    """Raise PortInUse now rather than after a long wait for something else; port 0 is always free."""
    if port and not _is_free(host, port):
        raise port_taken(port, flag)


def _bind(
    server: aio.Server, host: str, port: int, flag: str, may_move: bool, tls: TlsSlice | None
) -> int:
    most = _MOST_PORTS if may_move and port else 1
    for candidate in range(port, min(port + most, 65536)):
        if not _is_free(host, candidate):
            continue
        try:
            address = join_address(host, candidate)
            if tls is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, server_credentials(tls))
        except RuntimeError:  # taken between the look and the bind
            continue
        if bound:
            if port and bound != port:
                _log.warning("control port is taken, moved on", port=port, took=bound)
            return bound
    raise port_taken(port, flag)


def _is_free(host: str, port: int) -> bool:
    """Look before gRPC does, whose failure to bind also prints to stderr."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except socket.gaierror as error:
            raise UsageError(f"host {host} is no address of this machine") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return True


class _Guard:
    """Stands before every handler: proof, addressee, deadline; behind it: errors become statuses."""

    def __init__(self, service: str, cluster_key: bytes, incarnation: str) -> None:
        self.service = service
        self._key = proof.control_key(cluster_key)
        self._incarnation = incarnation

    def unary(
        self,
        method: str,
        kind: type[Request],
        call: Callable[[Request], Awaitable[Message]],
    ) -> MethodHandler:
        async def serve(raw: bytes, context: Context) -> bytes:
            try:
                self._check(method, context)
                return (await call(_decoded(kind, raw))).SerializeToString()
            except Exception as error:  # noqa: BLE001 - the gRPC edge: one call fails, nothing else
                failure = self.failure(method, error)
            await context.abort(*failure)
            raise AssertionError("abort does not return")

        return grpc.unary_unary_rpc_method_handler(serve)

    def stream(
        self,
        method: str,
        call: Callable[[AsyncIterator[GenerationsUp]], AsyncGenerator[GenerationsDown, None]],
    ) -> MethodHandler:
        async def serve(raws: AsyncIterator[bytes], context: Context) -> None:
            try:
                self._check(method, context)
                async with contextlib.aclosing(call(_ups(raws))) as downs:
                    async for down in downs:
                        await context.write(convert_streams.from_down(down).SerializeToString())
                return
            except Exception as error:  # noqa: BLE001 - the gRPC edge: one stream ends, nothing else
                failure = self.failure(method, error)
            await context.abort(*failure)

        return grpc.stream_stream_rpc_method_handler(serve)

    def _check(self, method: str, context: Context) -> None:
        given = dict(context.invocation_metadata() or ())
        path = f"/{self.service}/{method}"
        proof.check(self._key, given, method=path, incarnation=self._incarnation)
        if context.time_remaining() is None:
            raise InvalidValue("a control call must carry a deadline")

    def failure(
        self, method: str, error: Exception
    ) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
        """What the caller is told; logged when it is not about a request."""
        if not isinstance(error, RequestError):
            _log.warning(
                "control call failed",
                method=method,
                reason=str(error),
                exc_info=None if isinstance(error, XllmError) else error,
            )
        if isinstance(error, XllmError):
            return status.to_status(error)
        text = f"{method} failed inside this process; its log says why"
        return grpc.StatusCode.INTERNAL, text, (("xllm-code", "internal_error"),)


def _decoded(kind: type[Request], raw: bytes) -> Request:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ProtocolViolation(f"the message is no {kind.__name__}") from error


async def _ups(raws: AsyncIterator[bytes]) -> AsyncIterator[GenerationsUp]:
    async for raw in raws:
        yield convert_streams.to_up(_decoded(pb.GenerationsUp, raw))


async def _submit(guard: _Guard, to: InstanceHandlers, message: pb.SubmitRequest) -> Message:
    """One after the other; a refusal of one is not the call's."""
    reply = pb.SubmitReply()
    for index, submission in enumerate(convert.to_submissions(message)):
        try:
            await to.submit(submission)
        except XllmError as error:
            _, text, told = guard.failure("Submit", error)
            reply.refusals.add(index=index, message=text, told=dict(told))
    return reply


def _instance_table(guard: _Guard, to: InstanceHandlers) -> dict[str, MethodHandler]:
    async def submit(message: pb.SubmitRequest) -> Message:
        return await _submit(guard, to, message)

    async def add_new_requests(message: pb.AddNewRequestsRequest) -> Message:
        return convert.from_answers(await to.add_new_requests(convert.to_offers(message)))

    async def first_generation(message: pb.FirstGenerationRequest) -> Message:
        accepted = await to.first_generation(convert.to_firsts(message))
        return pb.FirstGenerationReply(accepted=accepted)

    async def link_instance(message: pb.LinkInstanceRequest) -> Message:
        await to.link_instance(convert.to_card_json(message.card_json))
        return pb.LinkInstanceReply()

    async def probe_peer(message: pb.ProbePeerRequest) -> Message:
        card_json = convert.to_card_json(message.card_json)
        return convert.from_health(await to.probe_peer(card_json, message.fetch))

    async def unlink_instance(message: pb.UnlinkInstanceRequest) -> Message:
        await to.unlink_instance(message.name, message.incarnation)
        return pb.UnlinkInstanceReply()

    async def cancel(message: pb.CancelRequest) -> Message:
        return pb.CancelReply(states=await to.cancel(*convert.to_cancel(message)))

    async def drain(message: pb.DrainRequest) -> Message:
        return pb.DrainReply(num_open=await to.drain(message.mode, message.timeout_s))

    async def describe(message: pb.DescribeRequest) -> Message:
        return pb.DescribeReply(
            json=json.dumps(await to.describe(label(message.stream_id))).encode()
        )

    return {
        "Submit": guard.unary("Submit", pb.SubmitRequest, submit),
        "AddNewRequests": guard.unary("AddNewRequests", pb.AddNewRequestsRequest, add_new_requests),
        "FirstGeneration": guard.unary(
            "FirstGeneration", pb.FirstGenerationRequest, first_generation
        ),
        "LinkInstance": guard.unary("LinkInstance", pb.LinkInstanceRequest, link_instance),
        "ProbePeer": guard.unary("ProbePeer", pb.ProbePeerRequest, probe_peer),
        "UnlinkInstance": guard.unary("UnlinkInstance", pb.UnlinkInstanceRequest, unlink_instance),
        "Generations": guard.stream("Generations", to.generations),
        "Cancel": guard.unary("Cancel", pb.CancelRequest, cancel),
        "Drain": guard.unary("Drain", pb.DrainRequest, drain),
        "Describe": guard.unary("Describe", pb.DescribeRequest, describe),
    }


def _master_table(guard: _Guard, to: MasterHandlers) -> dict[str, MethodHandler]:
    async def heartbeat(message: pb.HeartbeatRequest) -> Message:
        reply = await to.heartbeat(convert_streams.to_heartbeat(message))
        return convert_streams.from_heartbeat_reply(reply)

    async def get_instance_info(message: pb.GetInstanceInfoRequest) -> Message:
        return pb.GetInstanceInfoReply(card_json=await to.get_instance_info(message.name))

    return {
        "Generations": guard.stream("Generations", to.generations),
        "Heartbeat": guard.unary("Heartbeat", pb.HeartbeatRequest, heartbeat),
        "GetInstanceInfo": guard.unary(
            "GetInstanceInfo", pb.GetInstanceInfoRequest, get_instance_info
        ),
    }
