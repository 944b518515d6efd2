"""What a daemon tells systemd: READY, STATUS, STOPPING; WATCHDOG not yet. Silent when nobody listens (no NOTIFY_SOCKET)."""

from __future__ import annotations

import os
import socket


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


def watchdog_interval_s() -> float:
    """How often systemd wants a sign of life: half of WATCHDOG_USEC; 0 when it wants none."""
    word = os.environ.get("WATCHDOG_USEC", "")
    return int(word) / 2_000_000 if word.isdigit() else 0.0
