"""P's side of PULL: connections of takers that called, proven, until the link they are for takes them.

Filled by the listener's threads (tcp_accepted), emptied by those of tcp_giver. A new connection takes the place of the one before.
"""

from __future__ import annotations

import select
import socket
import threading

from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_socket
from xllm_py.transport.tcp_handshake import GiverEnd, Hold, Pause
from xllm_py.transport.tcp_socket import LinkBroken

PATIENCE_S = 3.0  # a taker that has not called for so long has given up; it needs two to see that a link is dead
MAX_WAITING = 512
_LOOK_S = 0.05  # how often who waits looks whether the link is still wanted

Place = tuple[str, int]  # incarnation of the taker, stream


class Callers:
    """All connections that nobody serves yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._state = threading.Condition()  # guards all below
        self._waiting: dict[Place, GiverEnd] = {}
        self._serving: dict[Place, socket.socket] = {}
        self._closed = False

    def __len__(self) -> int:
        """Connections that wait."""
        with self._state:
            return len(self._waiting)

    def put(self, end: GiverEnd) -> None:
        """A taker has called."""
        place = end.session.place
        with self._state:
            self._sweep()
            if self._closed or len(self._waiting) >= MAX_WAITING:
                end.close()
                return
            older = self._waiting.pop(place, None)
            if older is not None:
                older.close()
            self._waiting[place] = end
            if place in self._serving:
                tcp_socket.cut(self._serving.pop(place))
            self._state.notify_all()

    def _sweep(self) -> None:
        """Lock held. Takers that have hung up, and connections whose links are over."""
        for place, end in list(self._waiting.items()):
            if _hung_up(end.sock):
                end.close()
                del self._waiting[place]
        for place, sock in list(self._serving.items()):
            if sock.fileno() < 0:
                del self._serving[place]

    def take(self, place: Place, hold: Hold, pause: Pause) -> GiverEnd:
        """Wait for the connection. Raises LinkBroken when it does not come, or is not wanted any more."""
        until = self._clock.now() + PATIENCE_S
        while True:
            with self._state:
                self._state.wait_for(lambda: place in self._waiting, _LOOK_S)
                end = self._waiting.pop(place, None)
                if end is not None:
                    self._serving[place] = end.sock
            if end is not None:
                try:
                    hold(end.sock)
                except LinkBroken:
                    end.close()
                    raise
                return end
            if self._clock.now() >= until:
                raise LinkBroken("the decode instance does not fetch")
            if not pause(0.0):
                raise LinkBroken("closed")

    def close(self) -> None:
        """Of all that wait; those that come are closed at once."""
        with self._state:
            self._closed = True
            for end in self._waiting.values():
                end.close()
            self._waiting.clear()


class Awaited:
    """Gives one link its connections, as often as the taker calls."""

    def __init__(self, callers: Callers, place: Place) -> None:
        self._callers = callers
        self._place = place

    def __call__(self, hold: Hold, pause: Pause, again: bool) -> GiverEnd:
        """The next one. Raises LinkBroken."""
        return self._callers.take(self._place, hold, pause)


def _hung_up(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(0))
