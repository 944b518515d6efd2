"""grpc.aio without sockets, for simulated processes: the calls and streams that xllm_py.control makes and answers.

Everything above is the real thing: clients, converters, the proof of the cluster key, the server's guard. A `Network` decides how
long messages travel and which are lost; it can cut a connection, or keep two processes apart for a while. Streams keep their
order, calls do not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import grpc
from grpc import aio

from tests.sim.virtual import PROCESS, Process

FAST_S = (0.0001, 0.0015)


class Weather:
    """How good the network is. Shares are of unary calls."""

    def __init__(
        self, *, slow: float = 0.0, lost: float = 0.0, unanswered: float = 0.0, slow_s: float = 0.05
    ) -> None:
        self.slow, self.lost, self.unanswered, self.slow_s = slow, lost, unanswered, slow_s


class Network:
    """Who listens where, who is connected with whom."""

    def __init__(self, loop: asyncio.AbstractEventLoop, random: Random, weather: Weather) -> None:
        self.loop = loop
        self.random = random
        self.weather = weather
        self.servers: dict[str, Server] = {}
        self.streams: list[StreamCall] = []
        self.calls: list[UnaryCall] = []
        self.apart: dict[tuple[str, str], float] = {}  # (caller, callee) by name -> until
        self.trace: Callable[..., None] = lambda *_words: None

    def delay_s(self) -> float:
        """Of one message."""
        delay_s = self.random.uniform(*FAST_S)
        if self.weather.slow and self.random.random() < self.weather.slow:
            delay_s += self.random.uniform(0, self.weather.slow_s)
        return delay_s

    def happens(self, share: float) -> bool:
        """Draw."""
        return share > 0 and self.random.random() < share

    def reach(self, caller: Process, address: str) -> Server | None:
        """The server at an address, when a message from there arrives now."""
        server = self.servers.get(address)
        if server is None or not caller.alive or not server.process.alive:
            return None
        until = self.apart.get((caller.name, server.process.name), 0.0)
        return None if until > self.loop.time() else server

    def between(self, one: str, other: str) -> Iterator[StreamCall | UnaryCall]:
        """Open calls of two processes, by name."""
        for call in [*self.streams, *self.calls]:
            if {call.caller.name, call.callee_name} == {one, other}:
                yield call

    def cut(self, one: str, other: str, apart_s: float) -> None:
        """Break every connection of two processes; they do not find each other for a while."""
        until = self.loop.time() + apart_s
        self.apart[one, other] = self.apart[other, one] = until
        for call in list(self.between(one, other)):
            call.break_off()

    def bury(self, process: Process) -> None:
        """A process died: its port is closed, its connections are reset."""
        process.alive = False
        if self.servers.get(process.address, None) is not None:
            del self.servers[process.address]
        for call in [*self.streams, *self.calls]:
            if process in (call.caller, call.callee):
                call.break_off()


class Details(NamedTuple):
    """What a generic handler is asked by."""

    method: str
    invocation_metadata: Any


class Aborted(Exception):
    """context.abort was called."""

    def __init__(self, code: grpc.StatusCode, details: str, trailer: Any) -> None:
        super().__init__(details)
        self.error = aio.AioRpcError(code, aio.Metadata(), trailer, details=details)


def unavailable(text: str) -> aio.AioRpcError:
    """What a caller sees of a peer that is not there."""
    return aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), (), details=text)


class ServerContext:
    """The handler's view of a call."""

    def __init__(self, metadata: Any, write: Callable[[bytes], None] | None = None) -> None:
        self._metadata = metadata
        self._write = write

    def invocation_metadata(self) -> Any:
        """The caller's."""
        return self._metadata

    def time_remaining(self) -> float:
        """Every caller of ours gives a deadline; it is kept at the caller's end."""
        return 1.0

    async def write(self, message: bytes) -> None:
        """A stream's answer."""
        assert self._write is not None
        self._write(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailer: Any = ()) -> None:
        """End the call with an error."""
        raise Aborted(code, details, trailer)


class Server:
    """aio.server of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._handlers: tuple[Any, ...] = ()
        self._methods: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        """See grpc.aio.Server."""
        self._handlers = handlers

    def add_insecure_port(self, _address: str) -> int:
        """Each process has its own port, also in its next life."""
        return self.process.port

    async def start(self) -> None:
        """Listen."""
        self.process.network.servers[self.process.address] = self

    async def stop(self, _grace_s: float) -> None:
        """Not needed: processes of a simulation die."""

    def method(self, path: str) -> Any:
        """The handler of a method."""
        if path not in self._methods:
            found = (handler.service(Details(path, ())) for handler in self._handlers)
            self._methods[path] = next(each for each in found if each is not None)
        return self._methods[path]

    def run(self, work: Awaitable[Any], done: Callable[[Any, BaseException | None], None]) -> Any:
        """Serve one call in this process; `done` hears result or error, nothing when the process died."""

        async def serve() -> None:
            try:
                result = await work
            except Aborted as aborted:
                done(None, aborted.error)
            else:
                done(result, None)

        return self.process.network.loop.create_task(serve(), context=self.process.context)


class UnaryCall:
    """One question and its answer."""

    def __init__(self, caller: Process, address: str, path: str) -> None:
        self.network: Network = caller.network
        self.caller = caller
        self.callee: Process | None = None
        self.callee_name = ""
        self._address, self._path = address, path
        self._serving: asyncio.Task[Any] | None = None
        self._reply: asyncio.Future[bytes] = self.network.loop.create_future()

    async def ask(self, request: bytes, metadata: Any) -> bytes:
        """Raises AioRpcError. A caller that goes away takes the handler with it, as gRPC does."""
        network = self.network
        network.calls.append(self)
        try:
            if not network.happens(network.weather.lost):
                network.loop.call_later(network.delay_s(), self._arrive, request, metadata)
            return await self._reply
        finally:
            network.calls.remove(self)
            if self._serving is not None and not self._serving.done():
                self._serving.cancel()

    def _arrive(self, request: bytes, metadata: Any) -> None:
        if self._reply.done():
            return
        server = self.network.reach(self.caller, self._address)
        if server is None:
            self._reply.set_exception(unavailable("failed to connect to all addresses"))
            return
        self.callee, self.callee_name = server.process, server.process.name
        self.network.trace("call", self.caller.name, self.callee_name, self._path)
        handler = server.method(self._path).unary_unary
        self._serving = server.run(handler(request, ServerContext(dict(metadata))), self._answer)

    def _answer(self, reply: Any, error: BaseException | None) -> None:
        network = self.network
        if not network.happens(network.weather.unanswered):
            network.loop.call_later(network.delay_s(), self._settle, reply, error)

    def _settle(self, reply: Any, error: BaseException | None) -> None:
        if self._reply.done():
            return
        if error is not None:
            self._reply.set_exception(error)
        else:
            self._reply.set_result(reply)

    def break_off(self) -> None:
        """The connection broke; what arrived is still served, as on a machine that has not heard of it yet."""
        self._serving = None
        if not self._reply.done():
            self._reply.set_exception(unavailable("connection reset by peer"))


class Way:
    """One direction of a stream: messages in order, each after its delay."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._due = 0.0
        self._news = asyncio.Event()
        self.broken: aio.AioRpcError | None = None

    def put(self, message: bytes | None) -> None:
        """None ends it in order."""
        loop = self._network.loop
        self._due = max(self._due, loop.time() + self._network.delay_s())
        self._queue.append((self._due, message))
        loop.call_at(self._due, self._news.set)

    def break_off(self, error: aio.AioRpcError) -> None:
        """Nothing more arrives, not even what is on its way."""
        self.broken = error
        self._queue.clear()
        self._news.set()

    async def get(self) -> bytes | None:
        """The next message, None at the end. Raises AioRpcError when it broke."""
        while True:
            if self.broken is not None:
                raise self.broken
            if self._queue and self._queue[0][0] <= self._network.loop.time() + 1e-9:
                message = self._queue[0][1]
                if message is not None:
                    self._queue.popleft()
                return message
            self._news.clear()
            await self._news.wait()

    def __aiter__(self) -> Way:
        return self

    async def __anext__(self) -> bytes:
        message = await self.get()
        if message is None:
            raise StopAsyncIteration
        return message


class StreamCall:
    """A stream-stream call, opened at once."""

    def __init__(self, caller: Process, address: str, path: str, metadata: Any) -> None:
        self.network: Network = caller.network
        self.caller = caller
        self.callee: Process | None = None
        self.callee_name = ""
        self._up, self._down = Way(self.network), Way(self.network)
        self._serving: asyncio.Task[Any] | None = None
        self._ended = False
        self.network.streams.append(self)
        delay_s = self.network.delay_s()
        self.network.loop.call_later(delay_s, self._arrive, address, path, metadata)

    def _arrive(self, address: str, path: str, metadata: Any) -> None:
        if self._ended:
            return
        server = self.network.reach(self.caller, address)
        if server is None:
            self._fail(unavailable("failed to connect to all addresses"))
            return
        self.callee, self.callee_name = server.process, server.process.name
        self.network.trace("stream", self.caller.name, self.callee_name)
        context = ServerContext(dict(metadata), self._down.put)
        self._serving = server.run(
            server.method(path).stream_stream(self._up, context), self._answered
        )

    def _answered(self, _result: Any, error: BaseException | None) -> None:
        """The handler returned: the caller sees the end after all that was written."""
        if isinstance(error, aio.AioRpcError):
            self._fail(error)
        else:
            self._down.put(None)

    def _fail(self, error: aio.AioRpcError) -> None:
        self._ended = True
        if self in self.network.streams:
            self.network.streams.remove(self)
        self._up.break_off(error)
        self._down.break_off(error)
        if self._serving is not None and not self._serving.done():
            self._serving.cancel()

    def break_off(self) -> None:
        """The connection broke; both ends hear of it."""
        if not self._ended:
            self._fail(unavailable("connection reset by peer"))

    # ---- the caller's end ----

    async def write(self, message: bytes) -> None:
        """Raises AioRpcError when it broke."""
        if self._up.broken is not None:
            raise self._up.broken
        self._up.put(message)

    async def read(self) -> Any:
        """See grpc.aio."""
        message = await self._down.get()
        return aio.EOF if message is None else message

    async def code(self) -> grpc.StatusCode:
        """What it broke of."""
        return self._down.broken.code() if self._down.broken else grpc.StatusCode.OK

    async def details(self) -> str:
        """The same in words."""
        return (self._down.broken.details() or "") if self._down.broken else ""

    async def trailing_metadata(self) -> Any:
        """The server's, with an error of ours in it."""
        return self._down.broken.trailing_metadata() if self._down.broken else ()

    def cancel(self) -> None:
        """The caller goes away; the server hears it a little later."""
        if not self._ended:
            self._ended = True
            self._down.break_off(unavailable("cancelled here"))
            self.network.loop.call_later(self.network.delay_s(), self._fail, unavailable("left"))


class Channel:
    """aio.insecure_channel of one process."""

    def __init__(self, caller: Process, address: str) -> None:
        self._caller, self._address = caller, address

    def unary_unary(self, path: str) -> Callable[..., Awaitable[bytes]]:
        """See grpc.aio.Channel."""

        async def call(request: bytes, *, timeout: float, metadata: Any) -> bytes:  # noqa: ASYNC109  gRPC's own; the client waits no longer
            return await UnaryCall(self._caller, self._address, path).ask(request, metadata)

        return call

    def stream_stream(self, path: str) -> Callable[..., StreamCall]:
        """See grpc.aio.Channel."""

        def call(*, timeout: float, metadata: Any) -> StreamCall:
            return StreamCall(self._caller, self._address, path, metadata)

        return call

    async def close(self) -> None:
        """Calls that are open end by themselves."""


@contextlib.contextmanager
def memory_grpc() -> Iterator[None]:
    """Inside, gRPC's channels and servers are those of this file."""

    def channel(address: str, options: Any = ()) -> Channel:
        return Channel(PROCESS.get(), address)

    def server(options: Any = ()) -> Server:
        return Server(PROCESS.get())

    with (
        mock.patch.object(aio, "insecure_channel", channel),
        mock.patch.object(aio, "server", server),
    ):
        yield
