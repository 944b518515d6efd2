"""The registry over a real etcd, or anything that speaks its v3 API: unary calls with deadlines, on grpc.aio.

etcd3, the library, would block the event loop, and its watcher never comes back after an outage; see docs/decisions. Its
synchronous client makes the first contact at start (registry/etcd_sync). The two loops are registry/etcd_lease and
registry/etcd_watch. A namespace is put before every key here and taken off again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import grpc

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import etcd_sync
from xllm_py.registry.base import Entry, Lease, Put
from xllm_py.registry.etcd_lease import EtcdLease
from xllm_py.registry.etcd_stubs import rpc_pb2, rpc_pb2_grpc
from xllm_py.registry.etcd_watch import EtcdWatch

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),  # etcd answers more than one ping in 5 s with GOAWAY
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),  # else 60 s, and a dead peer stays unseen for 69
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_RETRY_S = 0.2

_log = log.get(__name__)


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with this prefix; a zero byte when there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def normal_namespace(namespace: str) -> str:
    """`a/b`, `/a/b/` -> `/a/b/`; empty stays empty."""
    bare = namespace.strip("/")
    return f"/{bare}/" if bare else ""


class EtcdRegistry:
    """Implements base.Registry."""

    def __init__(self, config: EtcdSlice, *, authority: bytes | None, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._namespace = normal_namespace(config.namespace)
        self._channel = _open_channel(config.address, authority)
        self.kv = rpc_pb2_grpc.KVStub(self._channel)
        self.leases = rpc_pb2_grpc.LeaseStub(self._channel)
        self.watches = rpc_pb2_grpc.WatchStub(self._channel)
        self._auth = rpc_pb2_grpc.AuthStub(self._channel)
        self._token = ""
        self._tasks = TaskFamily("registry")
        self.up = False

    async def connect(self) -> None:
        """Try until the registry answers or start_timeout_s has passed; wrong credentials are told at once."""
        deadline = self._clock.now() + self._config.start_timeout_s
        while True:
            try:
                await self._greet()
                await self._sign_in()
                return
            except RegistryUnavailable as error:
                if self._clock.now() + _RETRY_S > deadline or "refuses" in error.message:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _greet(self) -> None:
        try:
            found = await asyncio.to_thread(etcd_sync.greet, self._config, self.key("XLLM:"))
        except grpc.RpcError as error:
            raise self._unavailable(error) from error
        self.up = True
        _log.info("etcd found", endpoint=found.endpoint, version=found.version)

    async def _sign_in(self) -> None:
        if not self._config.username:
            return
        request = rpc_pb2.AuthenticateRequest(
            name=self._config.username, password=self._config.password
        )
        try:
            answer = await self._auth.Authenticate(request, timeout=self._config.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(error) from error
        self._token = answer.token

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        leader = (("hasleader", "true"),)
        return (*leader, ("token", self._token)) if self._token else leader

    async def call(self, method: Any, request: Any) -> Any:
        """One unary call with a deadline; signs in again when the token has expired."""
        for attempt in (1, 2):
            try:
                answer = await method(
                    request, timeout=self._config.timeout_s, metadata=self.metadata()
                )
            except grpc.aio.AioRpcError as error:
                expired = error.code() is grpc.StatusCode.UNAUTHENTICATED and self._token
                if expired and attempt == 1:
                    await self._sign_in()
                    continue
                self.up = False
                raise self._unavailable(error) from error
            self.up = True
            return answer
        raise AssertionError("unreachable: the second attempt returns or raises")

    def _unavailable(self, error: grpc.RpcError) -> RegistryUnavailable:
        code, details = error.code(), error.details() or ""
        address = self._config.address
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED) or (
            "authentication" in details or "user name is empty" in details
        ):
            return RegistryUnavailable(
                f"etcd at {address} refuses us ({details}); check ETCD_USERNAME and ETCD_PASSWORD"
            )
        if "SSL" in details or "certificate" in details.lower():
            return RegistryUnavailable(
                f"etcd at {address} refuses TLS ({details}); check --tls_ca_file"
            )
        reason = (
            "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "not reachable"
        )
        return RegistryUnavailable(
            f"etcd at {address}: {reason}; check --etcd_addr, and that etcd runs"
        )

    def key(self, key: str) -> bytes:
        """With the namespace."""
        return (self._namespace + key).encode()

    def end_of(self, start: bytes) -> bytes:
        """The first key after a prefix."""
        return prefix_end(start)

    def entry(self, record: Any) -> Entry:
        """Our value of etcd's KeyValue. Anybody may have put a key that is no text; it must not end the watch."""
        name = record.key.decode(errors="replace")[len(self._namespace) :]
        return Entry(key=name, value=record.value, revision=record.mod_revision)

    async def lease(self, ttl_s: int) -> Lease:
        """See Registry."""
        lease = EtcdLease(self, ttl_s, self._clock)
        await lease.grant()
        self._tasks.start(lease.keep(), name="lease")
        return lease

    async def put(self, key: str, value: bytes) -> None:
        """See Registry."""
        await self.call(self.kv.Put, rpc_pb2.PutRequest(key=self.key(key), value=value))

    async def swap(self, seen: Mapping[str, int], puts: Sequence[Put]) -> bool:
        """See Registry."""
        compare = [
            rpc_pb2.Compare(
                key=self.key(key),
                target=rpc_pb2.Compare.MOD,
                result=rpc_pb2.Compare.EQUAL,
                mod_revision=revision,
            )
            for key, revision in seen.items()
        ]
        success = [
            rpc_pb2.RequestOp(
                request_put=rpc_pb2.PutRequest(
                    key=self.key(put.key), value=put.value, lease=put.lease
                )
            )
            for put in puts
        ]
        request = rpc_pb2.TxnRequest(compare=compare, success=success)
        return bool((await self.call(self.kv.Txn, request)).succeeded)

    async def get(self, key: str) -> bytes | None:
        """See Registry."""
        answer = await self.call(self.kv.Range, rpc_pb2.RangeRequest(key=self.key(key)))
        return answer.kvs[0].value if answer.kvs else None

    async def entries(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """See Registry."""
        start = self.key(prefix)
        request = rpc_pb2.RangeRequest(key=start, range_end=prefix_end(start))
        answer = await self.call(self.kv.Range, request)
        return [self.entry(record) for record in answer.kvs], answer.header.revision

    async def delete(self, key: str) -> bool:
        """See Registry."""
        request = rpc_pb2.DeleteRangeRequest(key=self.key(key))
        return bool((await self.call(self.kv.DeleteRange, request)).deleted)

    def watch(
        self, prefix: str, known: Sequence[Entry], revision: int
    ) -> AsyncGenerator[list[Entry], None]:
        """See Registry."""
        return EtcdWatch(self, prefix, known, revision).changes()

    async def close(self) -> None:
        """See Registry."""
        await self._tasks.close()
        await self._channel.close()


def _open_channel(address: str, authority: bytes | None) -> grpc.aio.Channel:
    """One channel over all endpoints of a comma list."""
    hosts = etcd_sync.endpoints(address)
    target = hosts[0] if len(hosts) == 1 else "ipv4:" + ",".join(hosts)
    if address.startswith("https://"):
        credentials = grpc.ssl_channel_credentials(root_certificates=authority)
        return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
    return grpc.aio.insecure_channel(target, options=_OPTIONS)
