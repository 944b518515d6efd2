"""The calling side of the control services: one class per service, and the long Generations stream.

Values in, values out; a call that fails raises the RequestError leaf the peer raised, LayoutMismatch, ProtocolViolation,
StaleIncarnation, or PeerUnavailable for everything else (unreachable, too late, broken). Nothing is retried here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from xllm_py.base.errors import PeerUnavailable, ProtocolViolation, XllmError
from xllm_py.control import convert, convert_streams, methods, proof, status
from xllm_py.control.channels import Channels
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.core.service_config import TlsSlice
from xllm_py.wire.control_messages import (
    GenerationsDown,
    GenerationsUp,
    Heartbeat,
    HeartbeatReply,
    LinkHealth,
)

CANCEL_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 15.0  # a link may take four seconds to fail, and P may be computing a long step
DESCRIBE_TIMEOUT_S = 1.0
_STATUS_TIMEOUT_S = 1.0
STREAM_TIMEOUT_S = 24 * 3600.0  # every call has a deadline; after this one a stream is opened again

Reply = TypeVar("Reply", bound="_Message")


class _Message(Protocol):
    @classmethod
    def FromString(cls, raw: bytes, /) -> Any: ...  # noqa: N802 - protobuf's name

    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's name


class _Caller:
    """Calls one service at one address."""

    def __init__(
        self,
        address: str,
        service: str,
        *,
        cluster_key: bytes,
        sender: str,
        addressee: str,
        channels: Channels | None,
        tls: TlsSlice | None = None,
    ) -> None:
        self.address = address
        self._service = service
        self._key = proof.control_key(cluster_key)
        self._sender = sender
        self._addressee = addressee
        self._channels = channels or Channels(tls=tls)
        self._owns_channels = channels is None
        self._channel = self._channels.get(address)

    def path(self, method: str) -> str:
        return f"/{self._service}/{method}"

    def metadata(self, method: str) -> proof.Metadata:
        return proof.metadata(
            self._key, method=self.path(method), sender=self._sender, addressee=self._addressee
        )

    async def unary(
        self, method: str, request: _Message, reply: type[Reply], timeout_s: float
    ) -> Reply:
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.grpc.unary_unary(
            self.path(method)
        )
        try:
            async with asyncio.timeout(timeout_s), self._channel.calls:
                raw = await call(
                    request.SerializeToString(),
                    timeout=timeout_s,
                    metadata=self.metadata(method),
                )
        except TimeoutError as error:
            raise PeerUnavailable(f"{method}: no answer in {timeout_s:g} s") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # nobody cancelled us: gRPC says so of a call whose channel is closed
            raise PeerUnavailable(f"{method}: the channel was closed") from error
        except aio.AioRpcError as error:
            raise _rebuilt(method, error) from error
        return _decoded(method, reply, raw)

    def stream(self, method: str) -> aio.StreamStreamCall[bytes, bytes]:
        opened: aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.grpc.stream_stream(
            self.path(method)
        )
        return opened(timeout=STREAM_TIMEOUT_S, metadata=self.metadata(method))

    async def close(self) -> None:
        if self._owns_channels:
            await self._channels.close()


def _rebuilt(method: str, error: aio.AioRpcError) -> Exception:
    trailer = error.trailing_metadata()
    return _named(method, status.from_status(error.code(), error.details() or "", trailer))


def _named(method: str, error: XllmError) -> XllmError:
    return (
        PeerUnavailable(f"{method}: {error.message}") if type(error) is PeerUnavailable else error
    )


def _decoded(method: str, reply: type[Reply], raw: bytes) -> Reply:
    try:
        decoded: Reply = reply.FromString(raw)
    except DecodeError as error:
        raise ProtocolViolation(f"{method}: the answer is no {reply.__name__}") from error
    return decoded


class InstanceClient:
    """Calls one instance's control port.

    sender: our incarnation id. addressee: theirs, when it is known; the wrong life then refuses with StaleIncarnation.
    channels: a shared cache; without one the client owns its channel and `close` closes it.
    """

    def __init__(
        self,
        address: str,
        *,
        cluster_key: bytes,
        sender: str,
        timeout_s: float,
        addressee: str = "",
        channels: Channels | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._caller = _Caller(
            address,
            methods.INSTANCE,
            cluster_key=cluster_key,
            sender=sender,
            addressee=addressee,
            channels=channels,
        )

    async def submit(self, submissions: Sequence[Submission]) -> list[XllmError | None]:
        """Hand requests over; of each its refusal, or None when it was accepted. At most MAX_SUBMISSIONS."""
        message = pb.SubmitRequest(
            submissions=[convert.from_submission(each) for each in submissions]
        )
        reply = await self._caller.unary("Submit", message, pb.SubmitReply, self._timeout_s)
        refusals: list[XllmError | None] = [None] * len(submissions)
        for row in reply.refusals:
            if row.index >= len(refusals):
                raise ProtocolViolation("Submit: a refusal of a request that was not sent")
            error = status.from_status(grpc.StatusCode.UNKNOWN, row.message, row.told.items())
            refusals[row.index] = _named("Submit", error)
        return refusals

    async def add_new_requests(self, offers: Sequence[Offer]) -> list[OfferAnswer]:
        """P asks D to take requests; one answer per offer, in order."""
        message = convert.from_offers(offers)
        reply = await self._caller.unary(
            "AddNewRequests", message, pb.AddNewRequestsReply, self._timeout_s
        )
        answers = convert.to_answers(reply)
        _same_length("AddNewRequests", len(answers), len(offers))
        return answers

    async def first_generation(self, firsts: Sequence[FirstToken]) -> list[bool]:
        """P tells D first tokens; False where D does not know the grant."""
        message = convert.from_firsts(firsts)
        reply = await self._caller.unary(
            "FirstGeneration", message, pb.FirstGenerationReply, self._timeout_s
        )
        _same_length("FirstGeneration", len(reply.accepted), len(firsts))
        return list(reply.accepted)

    async def link_instance(self, card_json: bytes) -> None:
        """Make D accept offers of the giver with this card. Raises LayoutMismatch saying what differs."""
        message = pb.LinkInstanceRequest(card_json=card_json)
        await self._caller.unary("LinkInstance", message, pb.LinkInstanceReply, self._timeout_s)

    async def probe_peer(self, card_json: bytes, *, fetch: bool = False) -> LinkHealth:
        """Make P try its KV link to the decode instance with this card; fetch: make D try to fetch from this prefill instance."""
        message = pb.ProbePeerRequest(card_json=card_json, fetch=fetch)
        reply = await self._caller.unary("ProbePeer", message, pb.ProbePeerReply, PROBE_TIMEOUT_S)
        return convert.to_health(reply)

    async def unlink_instance(self, name: str, incarnation: str) -> None:
        """Make D forget a giver and end its reservations; fine when unknown."""
        message = pb.UnlinkInstanceRequest(name=name, incarnation=incarnation)
        await self._caller.unary("UnlinkInstance", message, pb.UnlinkInstanceReply, self._timeout_s)

    async def cancel(
        self, request_ids: Sequence[str], attempts: Sequence[int], reason: str
    ) -> list[str]:
        """End requests (attempt 0: all attempts); the state each was found in, `unknown` leaves a tombstone."""
        message = pb.CancelRequest(request_ids=request_ids, attempts=attempts, reason=reason)
        reply = await self._caller.unary("Cancel", message, pb.CancelReply, CANCEL_TIMEOUT_S)
        return list(reply.states)

    async def drain(self, mode: str, timeout_s: float) -> int:
        """Take no new work; mode `finish` or `move`. Returns the number of open requests."""
        message = pb.DrainRequest(mode=mode, timeout_s=timeout_s)
        reply = await self._caller.unary("Drain", message, pb.DrainReply, self._timeout_s)
        return reply.num_open

    async def describe(self, stream_id: str = "") -> dict[str, Any]:
        """Card, state, load and ledger, for people; with a stream's id what was said of that request, for another master."""
        reply = await self._caller.unary(
            "Describe",
            pb.DescribeRequest(stream_id=stream_id),
            pb.DescribeReply,
            DESCRIBE_TIMEOUT_S,
        )
        try:
            value = json.loads(reply.json)
        except ValueError as error:
            raise ProtocolViolation("Describe: the answer is not JSON") from error
        if not isinstance(value, dict):
            raise ProtocolViolation("Describe: the answer is no object")
        return value

    async def close(self) -> None:
        """Close the channel when it is our own."""
        await self._caller.close()


class MasterClient:
    """Calls one master's rpc_server_port; the arguments are InstanceClient's. tls: of the channel when it is our own."""

    def __init__(
        self,
        address: str,
        *,
        cluster_key: bytes,
        sender: str,
        timeout_s: float,
        addressee: str = "",
        channels: Channels | None = None,
        tls: TlsSlice | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._caller = _Caller(
            address,
            methods.MASTER,
            cluster_key=cluster_key,
            sender=sender,
            addressee=addressee,
            channels=channels,
            tls=tls,
        )

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """Say how we are."""
        message = convert_streams.from_heartbeat(beat)
        reply = await self._caller.unary("Heartbeat", message, pb.HeartbeatReply, self._timeout_s)
        return convert_streams.to_heartbeat_reply(reply)

    async def get_instance_info(self, name: str) -> bytes:
        """An instance's card as it was signed. Raises RequestNotFound."""
        message = pb.GetInstanceInfoRequest(name=name)
        reply = await self._caller.unary(
            "GetInstanceInfo", message, pb.GetInstanceInfoReply, self._timeout_s
        )
        return convert.to_card_json(reply.card_json)

    async def close(self) -> None:
        """Close the channel when it is our own."""
        await self._caller.close()


class GenerationsStream:
    """One long stream of outputs to a master, or in relayed mode to P. Opened by construction, inside a running loop.

    `send` and iteration raise PeerUnavailable once the stream is broken; make a new one then. Iteration ends when the
    peer closed the stream in order.
    """

    def __init__(
        self,
        address: str,
        target: Literal["master", "instance"],
        *,
        cluster_key: bytes,
        sender: str,
        addressee: str = "",
        channels: Channels | None = None,
        tls: TlsSlice | None = None,
    ) -> None:
        service = methods.MASTER if target == "master" else methods.INSTANCE
        self.address = address
        self._caller = _Caller(
            address,
            service,
            cluster_key=cluster_key,
            sender=sender,
            addressee=addressee,
            channels=channels,
            tls=tls,
        )
        self._call = self._caller.stream("Generations")

    async def send(self, up: GenerationsUp) -> None:
        """Write one message; returns when it left for the transport."""
        try:
            await self._call.write(convert_streams.from_up(up).SerializeToString())
        except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError) as error:
            raise await self._why() from error

    async def _why(self) -> XllmError:
        """What ended the stream; a failed write itself says only `internal error`, the call's status says more."""
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                code, details = await self._call.code(), await self._call.details()
                trailer = await self._call.trailing_metadata()
        except TimeoutError:
            return PeerUnavailable("Generations: the stream is broken")
        return _named("Generations", status.from_status(code, details or "", trailer))

    def __aiter__(self) -> AsyncIterator[GenerationsDown]:
        return self._downs()

    async def _downs(self) -> AsyncIterator[GenerationsDown]:
        try:
            while True:
                raw = await self._call.read()
                if not isinstance(raw, bytes):
                    return
                yield convert_streams.to_down(_decoded("Generations", pb.GenerationsDown, raw))
        except aio.AioRpcError as error:
            raise _rebuilt("Generations", error) from error

    async def close(self) -> None:
        """End the stream at once."""
        self._call.cancel()
        await self._caller.close()


def _same_length(method: str, given: int, wanted: int) -> None:
    if given != wanted:
        raise ProtocolViolation(f"{method}: {given} answers to {wanted} questions")
