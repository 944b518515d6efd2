"""Ports for daemons that tests start: below those the kernel hands to outgoing connections, and none is given out twice."""

from __future__ import annotations

import contextlib
import os
import random
import socket

_FIRST, _PER_WORKER = 13_000, 1_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_left = list(range(_FIRST + _worker * _PER_WORKER, _FIRST + (_worker + 1) * _PER_WORKER))
random.Random(os.getpid()).shuffle(_left)  # another run beside this one looks elsewhere


def free_port() -> int:
    """A port nobody listens on; IndexError when a run has used up all of its own."""
    while True:
        port = _left.pop()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
