"""What a daemon tells systemd: READY, STATUS, STOPPING, WATCHDOG. Silent when nobody listens (no NOTIFY_SOCKET)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable


def notify(*words: str) -> None:
    """Send `READY=1` and the like in one datagram; a socket that is gone is systemd's business, not ours."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        try:
            out.connect(address)
            out.send("\n".join(words).encode())
        except OSError:
            return


async def feed_watchdog(alive: Callable[[], bool]) -> None:
    """Say WATCHDOG=1 as often as systemd wants it, for as long as `alive` agrees; returns at once when nobody wants it."""
    interval_s = watchdog_interval_s()
    while interval_s:
        if alive():
            notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def watchdog_interval_s() -> float:
    """How often systemd wants a sign of life: half of WATCHDOG_USEC; 0 when it wants none."""
    word = os.environ.get("WATCHDOG_USEC", "")
    return int(word) / 2_000_000 if word.isdigit() else 0.0
