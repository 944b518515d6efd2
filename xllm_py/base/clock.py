"""Time as a value one can pass: the real clock and one turned by hand.

Everything that waits or stamps takes a Clock; the pure floors take `now: float` instead (seconds, monotonic).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds on a monotonic scale, and seconds since 1970 for people."""

    def now(self) -> float:
        """Monotonic seconds; on Linux the same scale in every process of a machine."""
        ...

    def wall(self) -> float:
        """Seconds since 1970; never used to decide anything."""
        ...


class RealClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()


class HandClock:
    """A clock that stands still until a test turns it."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """What the hand shows."""
        return self._now_s

    def wall(self) -> float:
        """The same hand, so that tests see one scale."""
        return self._now_s

    def turn(self, seconds: float) -> float:
        """Move forward and return the new time."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not turn back")
        self._now_s += seconds
        return self._now_s
