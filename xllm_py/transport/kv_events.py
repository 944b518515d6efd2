"""What I/O threads tell the engine thread: a wake-up call, a queue of events behind one, and counters.

Used by the KV transports; knows no socket and no protocol.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from xllm_py.transport.base import KvEvent


class Wake:
    """A pipe that is readable after `ring` and until `hush`. Any thread may ring."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    @property
    def fd(self) -> int:
        """For select."""
        return self._read

    def ring(self) -> None:
        """Make it readable."""
        try:
            os.write(self._write, b"\0")
        except BlockingIOError:
            return  # a full pipe is readable already

    def hush(self) -> None:
        """Make it silent again."""
        try:
            while len(os.read(self._read, 4096)) == 4096:
                pass
        except BlockingIOError:
            return  # it was silent

    def close(self) -> None:
        """After the last ring only."""
        os.close(self._read)
        os.close(self._write)


class EventQueue:
    """Events from many threads to the one that polls."""

    def __init__(self) -> None:
        self.wake = Wake()
        self._events: deque[KvEvent] = deque()

    def put(self, event: KvEvent) -> None:
        """From any thread."""
        self._events.append(event)
        self.wake.ring()

    def take(self) -> list[KvEvent]:
        """All events so far, in order."""
        self.wake.hush()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class Counts:
    """Numbers that only grow, from many threads."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(names, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        with self._lock:
            self._counts[name] += amount

    def read(self) -> dict[str, int]:
        """A copy."""
        with self._lock:
            return dict(self._counts)
