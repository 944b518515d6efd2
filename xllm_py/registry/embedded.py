"""An etcd-v3-compatible server for one box: KV, Txn, Lease, Watch, Status, in memory. Not durable and not a cluster.

Started by `xllm-master --embedded_etcd`, by bin/etcd when no real etcd is on PATH, and by tests. What our client and etcdctl use of
etcd behaves as etcd does; conformance is the same suite that runs against a real etcd.

    python -m xllm_py.registry.embedded --listen-client-urls=http://127.0.0.1:12389
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
from collections.abc import Sequence

import grpc

from xllm_py.base.clock import Clock, RealClock
from xllm_py.base.errors import PortInUse, UsageError
from xllm_py.base.ports import port_taken
from xllm_py.base.tasks import TaskFamily
from xllm_py.registry.embedded_services import Cluster, Kv, LeaseService, Maintenance, WatchService
from xllm_py.registry.etcd_stubs import rpc_pb2_grpc
from xllm_py.registry.memory import Store

DEFAULT_ADDRESS = "127.0.0.1:12389"
NOTICE = "embedded registry: in memory and for one box only; keys are lost when it stops"
_EXPIRE_EVERY_S = 0.1
_FLAGS = ("--listen-client-urls", "--data-dir", "--name")


class EmbeddedEtcd:
    """A running server."""

    def __init__(self, server: grpc.aio.Server, port: int, tasks: TaskFamily) -> None:
        self._server = server
        self._tasks = tasks
        self.port = port

    async def close(self) -> None:
        """Stop; watches end."""
        await self._tasks.close()
        await self._server.stop(0.2)


async def serve_embedded(address: str, *, clock: Clock) -> EmbeddedEtcd:
    """Serve at host:port (port 0: any). Raises PortInUse."""
    store = Store(clock, first_lease=1 + secrets.randbits(62))
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    rpc_pb2_grpc.add_KVServicer_to_server(Kv(store), server)
    rpc_pb2_grpc.add_LeaseServicer_to_server(LeaseService(store), server)
    rpc_pb2_grpc.add_WatchServicer_to_server(WatchService(store), server)
    rpc_pb2_grpc.add_MaintenanceServicer_to_server(Maintenance(store), server)
    rpc_pb2_grpc.add_ClusterServicer_to_server(Cluster(store, address), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise port_taken(int(address.rpartition(":")[2]), "--etcd_addr") from error
    await server.start()
    tasks = TaskFamily("embedded-etcd")
    tasks.start(_expire(store), name="leases")
    return EmbeddedEtcd(server, port, tasks)


async def _expire(store: Store) -> None:
    while True:
        await asyncio.sleep(_EXPIRE_EVERY_S)
        store.expire()


def parse(words: Sequence[str]) -> str:
    """The address to serve. Raises UsageError for flags that only a real etcd knows."""
    values: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in _FLAGS:
            known = ", ".join(_FLAGS)
            raise UsageError(
                f"{word}: the embedded registry knows {known} only. Install etcd for more"
            )
        values[name] = value if equals else next(rest, "")
    url = values.get("--listen-client-urls", DEFAULT_ADDRESS).split(",")[0]
    address = url.partition("://")[2] or url
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--listen-client-urls={url} is no URL. Write http://127.0.0.1:12389")
    return address


async def _main(address: str) -> None:
    server = await serve_embedded(address, clock=RealClock())
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sys.stderr.write(f"{NOTICE}\nserving the etcd v3 API on {address}\n")
    await stop.wait()
    await server.close()


def main(words: Sequence[str]) -> int:
    """The exit code."""
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_main(parse(words)))
    except (UsageError, PortInUse) as error:
        sys.stderr.write(f"etcd: error: {error.message}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
