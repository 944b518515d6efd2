"""A helper process that may be killed at any moment, both ends: what a client sent is worked on there, within limits.

`Child` is the door's end; it is used by `chat_template` and `structured` from their threads. `serve` is the loop of the process,
called by `template_child` and `grammar_child`. Messages are msgpack after a 4-byte length, one answer each. The process is bounded
by RLIMIT_CPU and RLIMIT_AS and ends with its parent; it is started by exec and opens no connection.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

START_TIMEOUT_S = 20.0  # a fresh interpreter on a busy machine
WORK_TIMEOUT_S = 2.0
LIMITS = "over 1 s or 512 MiB"  # what to say of work that was cut off
_STOP_TIMEOUT_S = 5.0
_MEMORY_BYTES = 512 << 20
_PR_SET_PDEATHSIG = 1

A = TypeVar("A")


class Child(Generic[A]):
    """The process `python -m <module> <fd>` and our end of its socket. Not safe from several threads."""

    def __init__(self, module: str, answer: type[A]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
            )
        self._link = ours
        self._decoder = msgspec.msgpack.Decoder(answer)

    def ask(self, message: msgspec.Struct, timeout_s: float) -> A:
        """One answer; raises TimeoutError, or ConnectionError when the child has ended."""
        self._link.settimeout(timeout_s)
        _send(self._link, message)
        data = _receive(self._link)
        if not data:
            raise ConnectionResetError("the child process has ended")
        return self._decoder.decode(data)

    def is_alive(self) -> bool:
        """False once the process has ended, for whatever reason."""
        return self._process.poll() is None

    def close(self) -> None:
        """Kill and reap."""
        self._link.close()
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)


def serve(fd: int, messages: Any, answer: Callable[[Any], msgspec.Struct]) -> None:
    """Answer messages of these types (a Struct or a union of some) until the parent closes its end."""
    # fires when the thread that started us ends: the main one, or one of the door's own threads
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    link = socket.socket(fileno=fd)
    decoder = msgspec.msgpack.Decoder(messages)
    while data := _receive(link):
        _limit_cpu()
        _send(link, answer(decoder.decode(data)))


def _limit_cpu() -> None:
    """One more second of CPU for the next message (the limit counts whole seconds of the process's life)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _send(link: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    link.sendall(struct.pack("<I", len(data)) + data)


def _receive(link: socket.socket) -> bytes:
    """The next message; b"" when the other side has closed."""
    head = _receive_exactly(link, 4)
    return _receive_exactly(link, struct.unpack("<I", head)[0]) if head else b""


def _receive_exactly(link: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = link.recv(num_bytes - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)
