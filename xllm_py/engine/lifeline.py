"""A connection from every rank to rank 0 over which nothing is said: that it ends is the news that a process is gone.

A killed process's connections end within milliseconds, whatever its ranks are doing; collective operations would notice at the next one only.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
import threading
from collections.abc import Callable

from xllm_py.base.errors import DeviceUnavailable

_RANK = struct.Struct("<I")
_CONNECT_S = 10.0


class Lifelines:
    """Rank 0's ends. on_lost: called in a thread, with the rank."""

    def __init__(self, host: str, on_lost: Callable[[int], None]) -> None:
        self._on_lost = on_lost
        self._closing = False
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._start(self._accept, "lifelines")

    def _start(self, work: Callable[[], None], name: str) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._ends.append(end)
            self._start(functools.partial(self._hold, end), "lifeline")

    def _hold(self, end: socket.socket) -> None:
        rank = -1
        try:
            said = end.recv(_RANK.size, socket.MSG_WAITALL)
            if len(said) < _RANK.size:
                return  # nobody of ours
            (rank,) = _RANK.unpack(said)
            end.recv(1)
        except OSError:
            pass  # a reset is an end too
        if rank >= 0 and not self._closing:
            self._on_lost(rank)

    def close(self) -> None:
        """The others hear of it: they end as well."""
        self._closing = True
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):  # it has ended already
                end.shutdown(
                    socket.SHUT_RDWR
                )  # a thread reads from it: to close it says nothing yet
            end.close()


def hold(address: tuple[str, int], rank: int, on_lost: Callable[[], None]) -> socket.socket:
    """Another rank's end; on_lost: rank 0 is gone, or has closed. Raises DeviceUnavailable."""
    try:
        end = socket.create_connection(address, _CONNECT_S)
        end.settimeout(None)
        end.sendall(_RANK.pack(rank))
    except OSError as error:
        raise DeviceUnavailable(
            f"rank {rank} met rank 0 but cannot reach it at {address[0]}:{address[1]} ({error}); is that address open between the nodes?"
        ) from error

    def wait() -> None:
        with contextlib.suppress(OSError):  # a reset is an end too
            end.recv(1)
        on_lost()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    return end
