"""gRPC channels, one per address, shared by everything in a process that calls that address.

The options make a dead peer known: a refused connection at once, a vanished machine after about ten seconds, and a new
connection is tried soon after the last one failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from xllm_py.control.tls import channel_credentials
from xllm_py.core.service_config import TlsSlice

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# unary calls in flight on one channel; of 3,000 at once on one grpc.aio channel a quarter came back CANCELLED
MAX_CALLS = 256
KEEPALIVE_MS = 10_000

_COMMON = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # else a dead peer stays unseen for 69 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # else two servers bind one port without an error
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
)


@dataclass(slots=True)
class Channel:
    """A channel and the bound on its calls in flight."""

    grpc: aio.Channel
    calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CALLS))


class Channels:
    """One per process; a channel is opened when its address is first asked for."""

    def __init__(self, *, connect_timeout_s: float = 1.0, tls: TlsSlice | None = None) -> None:
        self._credentials = channel_credentials(tls) if tls is not None else None
        self._options = (
            *_COMMON,
            ("grpc.enable_http_proxy", 0),
            (
                "grpc.use_local_subchannel_pool",
                1,
            ),  # else a new channel inherits an old one's back-off
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),
        )
        self._open: dict[str, Channel] = {}

    def get(self, address: str) -> Channel:
        """The channel to `host:port`; connecting happens with the first call."""
        channel = self._open.get(address)
        if channel is None:
            channel = self._open[address] = Channel(self._dial(address))
        return channel

    def _dial(self, address: str) -> aio.Channel:
        if self._credentials is None:
            return aio.insecure_channel(address, options=self._options)
        return aio.secure_channel(address, self._credentials, options=self._options)

    def drop(self, address: str) -> Coroutine[Any, Any, None]:
        """Forget the channel to an address at once, and close it when awaited; its open calls end then."""
        return _closed(self._open.pop(address, None))

    async def close(self) -> None:
        """Close all; open calls end."""
        for address in list(self._open):
            await self.drop(address)


async def _closed(channel: Channel | None) -> None:
    if channel is not None:
        await channel.grpc.close()
