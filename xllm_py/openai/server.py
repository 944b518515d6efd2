"""Runs an App inside the daemon's own event loop: a bound socket, uvicorn's HTTP protocol, limits it does not have.

Called by both daemons at start. Takes no signals, starts no workers, ends nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

import uvicorn

from xllm_py.base import log
from xllm_py.base.errors import UsageError
from xllm_py.base.ports import port_taken
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.service_config import TlsSlice
from xllm_py.openai.app import App
from xllm_py.openai.protocol import limited_protocol

_log = log.get(__name__)
_BACKLOG = 2048
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 2


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with a way to wait for its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The daemon owns the signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and say so."""
        await super().startup(sockets=sockets)
        self.up.set()


class HttpServer:
    """A running server; `port` is the real one."""

    def __init__(self, app: App, server: _Server, listener: socket.socket) -> None:
        self._app = app
        self._server = server
        self._listener = listener
        self._tasks = TaskFamily("http server")
        self.port: int = listener.getsockname()[1]

    async def start(self) -> None:
        """Listen; returns once connections are accepted."""
        self._serving = self._tasks.start(
            self._server.serve(sockets=[self._listener]), name="serve", vital=True
        )
        self._tasks.start(self._app.watch_loop(), name="loop lag")
        async with asyncio.timeout(_START_TIMEOUT_S):
            await self._server.up.wait()

    @property
    def num_connections(self) -> int:
        """Open connections, for the ledger."""
        return len(self._server.server_state.connections)

    async def wait_failed(self) -> BaseException:
        """Return when the server has ended by itself."""
        return await self._tasks.wait_failed()

    async def close(self) -> None:
        """Fail what is open with an error event, close connections, stop listening."""
        await self._app.close()
        self._server.should_exit = True
        _, late = await asyncio.wait([self._serving], timeout=_STOP_TIMEOUT_S + 2)
        if late:
            _log.warning("http server did not stop", connections=self.num_connections)
        await self._tasks.close()


def bind(host: str, port: int, family: socket.AddressFamily, flag: str) -> socket.socket:
    """A listening-to-be socket; raises PortInUse or UsageError with the fix. Port 0 takes any free one."""
    try:
        found = socket.getaddrinfo(
            host or None, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise UsageError(f"host {host} is no address of this machine; check --host") from error
    kind, _, protocol, _, address = found[0]
    listener = socket.socket(kind, socket.SOCK_STREAM, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(port, flag) from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


async def serve_http(
    app: App,
    host: str,
    port: int,
    *,
    flag: str = "--port",
    family: socket.AddressFamily = socket.AF_UNSPEC,
    tls: TlsSlice | None = None,
) -> HttpServer:
    """Bind, start, and return the running server. Raises PortInUse or UsageError before anything runs.

    flag: what chooses the port. tls: HTTPS with its certificate; clients need none.
    """
    settings = app.settings
    listener = bind(host, port, family, flag)
    # what it says of a connection is either answered by us or nobody's business
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app,
        http=limited_protocol(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=int(settings.idle_connection_s),
        timeout_graceful_shutdown=_STOP_TIMEOUT_S,
        ssl_certfile=tls.cert_file if tls is not None else None,
        ssl_keyfile=tls.key_file if tls is not None else None,
    )
    server = HttpServer(app, _Server(config), listener)
    await server.start()
    return server
