"""A TCP proxy that knows KV frames: what it does to a connection is said byte by byte or frame by frame beforehand.

    FaultProxy(target, plan): plan(n) is the Fault of the n-th connection, n = 0, 1, 2, ...

Offsets count the bytes of one direction; frames are counted from 0 after the handshake, in the direction from giver to taker.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.transport.tcp_socket import split_endpoint
from xllm_py.wire import codec

GREETING_BYTES = codec.HELLO_BYTES + codec.PROOF_BYTES  # what a giver says before its first frame
_LOOK_S = 0.005
_LINGER_NONE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What befalls one connection.

    By byte `at`: reset, fin, stall (nothing moves any more, both ways), flip (its lowest bit), drop and dup (`size` bytes).
    By frame `at`: drop frame, dup frame, swap frames (with the next one), replay (the frame comes again at the end).
    rate: bytes a second; delay_s: before every piece.
    """

    kind: str = "pass"
    at: int = 0
    size: int = 64
    back: bool = False  # of the bytes from taker to giver
    rate: float = float("inf")
    delay_s: float = 0.0


PASS = Fault()


class _Cut(Exception):
    """The connection ends here; args[0]: how."""


class _Stream:
    """One direction: bytes in, bytes out."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._offset = 0

    def feed(self, data: bytes) -> bytes:
        fault, start = self._fault, self._offset
        self._offset += len(data)
        place = fault.at - start
        if fault.kind == "pass" or not 0 <= place < len(data):
            return data
        match fault.kind:
            case "flip":
                return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            case "drop":
                return data[:place] + data[place + fault.size :]
            case "dup":
                return data[: place + fault.size] + data[place:]
        raise _Cut(fault.kind, data[:place])


class _Frames:
    """Bytes from giver to taker, frame by frame."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._kept = b""
        self._greeting_left = GREETING_BYTES
        self._index = 0
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        out, data = data[: self._greeting_left], data[self._greeting_left :]
        self._greeting_left -= len(out)
        self._kept += data
        while len(self._kept) >= codec.HEADER_BYTES:
            header = codec.unpack_header(self._kept[: codec.HEADER_BYTES])[0]
            size = codec.HEADER_BYTES + header.length
            if len(self._kept) < size:
                break
            frame, self._kept = self._kept[:size], self._kept[size:]
            out += self._mangle(frame)
            self._index += 1
        return out

    def _mangle(self, frame: bytes) -> bytes:
        kind, at = self._fault.kind, self._fault.at
        if kind == "dup frame" and self._index == at:
            return frame + frame
        if kind == "drop frame" and self._index == at:
            return b""
        if kind == "swap frames" and self._index == at:
            self._held = frame
            return b""
        if kind == "swap frames" and self._index == at + 1:
            return frame + self._held
        if kind == "replay" and self._index == at:
            self._held = frame
        if kind == "replay" and self._index == at + 2:
            return frame + self._held
        return frame


class FaultProxy:
    """Listens on loopback; every connection is passed on to `target`."""

    def __init__(
        self,
        target: str,
        plan: Callable[[int], Fault],
        *,
        called: bool = False,
        listen: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        """called: takers connect, the target is a giver."""
        self._called = called
        self._target = split_endpoint(target)
        self.plan = plan
        self._server = socket.create_server(listen)
        self.endpoint = f"{listen[0]}:{self._server.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self.num_connections = 0
        self.at_byte: Callable[[], None] | None = None  # called when a fault strikes
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10.0)
        self._server.close()

    def cut(self) -> None:
        """End the connections that are open now."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing.is_set():
            if not select.select([self._server], [], [], _LOOK_S)[0]:
                continue
            sock, _ = self._server.accept()
            fault = self.plan(self.num_connections)
            self.num_connections += 1
            thread = threading.Thread(
                target=self._carry, args=(sock, fault), name="proxy", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _carry(self, caller: socket.socket, fault: Fault) -> None:
        with caller, contextlib.suppress(OSError):
            target = socket.create_connection(self._target)
            with target:
                giver, taker = (target, caller) if self._called else (caller, target)
                self._open |= {giver, taker}
                try:
                    self._pump(giver, taker, fault)
                finally:
                    self._open -= {giver, taker}

    def _pump(self, giver: socket.socket, taker: socket.socket, fault: Fault) -> None:
        by_frame = "frame" in fault.kind or fault.kind == "replay"
        there: _Stream | _Frames = _Frames(fault) if by_frame else _Stream(fault)
        ways = {
            giver: (taker, _Stream(PASS) if fault.back else there),
            taker: (giver, _Stream(fault) if fault.back else _Stream(PASS)),
        }
        while not self._closing.is_set():
            for sock in select.select(list(ways), [], [], _LOOK_S)[0]:
                target, stream = ways[sock]
                data = sock.recv(1 << 16)
                if not data:
                    return
                try:
                    out = stream.feed(data)
                except _Cut as cut:
                    how, rest = cut.args
                    target.sendall(rest)
                    self._end(giver, taker, how)
                    return
                if fault.delay_s:
                    time.sleep(fault.delay_s)
                if fault.rate < float("inf"):
                    time.sleep(len(out) / fault.rate)
                target.sendall(out)

    def _end(self, giver: socket.socket, taker: socket.socket, how: str) -> None:
        if self.at_byte is not None:
            self.at_byte()
        if how == "reset":
            for sock in (giver, taker):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        elif how == "stall":
            self._closing.wait()
