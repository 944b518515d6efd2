"""The private socketpair between an instance's API process and its engine process: typed msgpack messages.

    u32 length of what follows, little-endian | u8 index into the message table | msgpack of that dataclass

`EnginePipe` is the engine's end (blocking, select-able), `ApiPipe` the API process's end (asyncio). A message of the wrong
type or size is a ProtocolViolation naming the field. Nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from xllm_py.base.errors import PeerUnavailable, ProtocolViolation
from xllm_py.core.plan import StepPlan
from xllm_py.wire.messages import COMMANDS, EVENTS, Command, Event

_HEAD = struct.Struct("<IB")
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_READ_BYTES = 1 << 20
SEND_TIMEOUT_S = 30.0  # an API process that takes nothing for so long is as good as dead


class Table:
    """Encodes one table of dataclasses and decodes the other."""

    def __init__(self, outgoing: Sequence[type], incoming: Sequence[type]) -> None:
        self._index = {kind: index for index, kind in enumerate(outgoing)}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoders: list[msgspec.msgpack.Decoder[Any]] = [
            msgspec.msgpack.Decoder(kind) for kind in incoming
        ]

    def encode(self, message: Any) -> bytes:
        body = self._encoder.encode(message)
        return _HEAD.pack(len(body) + 1, self._index[type(message)]) + body

    def decode(self, kind: int, body: bytes | bytearray | memoryview) -> Any:
        if kind >= len(self._decoders):
            raise ProtocolViolation(f"engine pipe: message kind {kind} is unknown")
        try:
            return self._decoders[kind].decode(body)
        except msgspec.DecodeError as error:
            raise ProtocolViolation(f"engine pipe: {error}") from error

    def take(self, buffer: bytearray) -> list[Any]:
        """Decode and remove every complete message at the front of `buffer`."""
        messages = []
        start = 0
        while len(buffer) - start >= _HEAD.size:
            length, kind = _HEAD.unpack_from(buffer, start)
            if not 1 <= length <= MAX_MESSAGE_BYTES:
                raise ProtocolViolation(f"engine pipe: message of {length} bytes")
            end = start + 4 + length
            if len(buffer) < end:
                break
            messages.append(self.decode(kind, bytes(buffer[start + _HEAD.size : end])))
            start = end
        del buffer[:start]
        return messages


_plans = msgspec.msgpack.Decoder(StepPlan)


def encode_plan(plan: StepPlan) -> bytes:
    """For the other ranks of an instance."""
    return msgspec.msgpack.encode(plan)


def decode_plan(raw: bytes) -> StepPlan:
    """As rank 0 encoded it. Raises ProtocolViolation."""
    try:
        return _plans.decode(raw)
    except msgspec.DecodeError as error:
        raise ProtocolViolation(f"plan of rank 0: {error}") from error


class BlockingPipe:
    """An end for threads: what it sends and what comes is each of one table."""

    def __init__(self, sock: socket.socket, table: Table, peer: str) -> None:
        """peer: who is at the other end, for people."""
        self._sock = sock
        self._sock.settimeout(SEND_TIMEOUT_S)
        self._table = table
        self._peer = peer
        self._buffer = bytearray()
        self._turn = threading.Lock()  # the last word may come from another thread

    def fileno(self) -> int:
        """For select."""
        return self._sock.fileno()

    def send(self, message: Any) -> None:
        """Blocks until the socket has taken it. Raises PeerUnavailable when the other side is gone or stuck."""
        try:
            with self._turn:
                self._sock.sendall(self._table.encode(message))
        except OSError as error:
            raise PeerUnavailable(f"{self._peer} takes no messages: {error}") from error

    def receive(self) -> list[Any]:
        """Blocks until bytes come and returns the complete messages, maybe none. Raises PeerUnavailable at the end."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except TimeoutError:
            return []
        except OSError as error:
            raise PeerUnavailable(f"{self._peer} is gone: {error}") from error
        if not data:
            raise PeerUnavailable(f"{self._peer} is gone")
        self._buffer += data
        return self._table.take(self._buffer)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class EnginePipe(BlockingPipe):
    """The engine's end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, Table(EVENTS, COMMANDS), "the API process")


class RankPipe:
    """The end of who starts another rank: it says what that one is to do, and hears how its start ended."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._table = Table(COMMANDS, EVENTS)

    def send(self, command: Command) -> None:
        """Blocks until the socket has taken it."""
        self._sock.sendall(self._table.encode(command))

    def last_word(self, timeout_s: float) -> Event | None:
        """What the other side said before it ended; None when it said nothing in this time."""
        self._sock.settimeout(timeout_s)
        buffer = bytearray()
        try:
            while data := self._sock.recv(_READ_BYTES):
                buffer += data
        except OSError:
            pass  # it may have been killed, and what it said before that is in the buffer
        events: list[Event] = self._table.take(buffer)
        return events[-1] if events else None


class ApiPipe:
    """The API process's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._table = Table(COMMANDS, EVENTS)
        self._buffer = bytearray()

    @classmethod
    async def open(cls, sock: socket.socket) -> ApiPipe:
        """Take over one end of a connected socketpair."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=_READ_BYTES)
        return cls(reader, writer)

    def send(self, command: Command) -> None:
        """Queue a command; the engine reads between steps. Raises PeerUnavailable when the engine is gone."""
        if self._writer.is_closing():
            raise PeerUnavailable("the engine process is gone")
        self._writer.write(self._table.encode(command))

    async def receive(self) -> list[Event]:
        """The next events, at least one. Raises PeerUnavailable at the end of the pipe.

        Has no deadline of its own: an idle engine is silent, and a dead one ends the pipe.
        """
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError as error:
                raise PeerUnavailable(f"the engine process is gone: {error}") from error
            if not data:
                raise PeerUnavailable("the engine process is gone")
            self._buffer += data
            events: list[Event] = self._table.take(self._buffer)
            if events:
                return events

    async def close(self) -> None:
        """Close our end; the engine sees it and stops."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)
        except (OSError, TimeoutError):
            return  # closed by the other side already
