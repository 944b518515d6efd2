"""A lease that keeps itself alive. Validity is counted from the moment a keep-alive was SENT, on a monotonic clock.

Past that, or when etcd says that the lease is gone, a new lease is granted and everything is put again under it; so a freeze of
etcd, a restart, or a wiped etcd ends in a clean registration.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import grpc

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.registry.base import EtcdAccess
from xllm_py.registry.etcd_stubs import rpc_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_FIRST_RETRY_S = 0.1
_MOST_RETRY_S = 1.0

_log = log.get(__name__)


class EtcdLease:
    """Implements base.Lease."""

    def __init__(self, etcd: EtcdAccess, ttl_s: int, clock: Clock) -> None:
        self._etcd = etcd
        self._ttl_s = ttl_s
        self._clock = clock
        self._id = 0
        self._valid_until = 0.0
        self._content: dict[str, bytes] = {}
        self._ended = False
        self._turn = (
            asyncio.Lock()
        )  # a renewal under way and a revocation are done one after the other

    @property
    def id(self) -> int:
        """See Lease."""
        return self._id

    @property
    def left_s(self) -> float:
        """See Lease."""
        return 0.0 if self._ended else self._valid_until - self._clock.now()

    async def grant(self) -> None:
        """A new lease with everything put under it. Raises RegistryUnavailable."""
        sent = self._clock.now()
        request = rpc_pb2.LeaseGrantRequest(TTL=self._ttl_s)
        self._id = (await self._etcd.call(self._etcd.leases.LeaseGrant, request)).ID
        # until everything stands under it: etcd would renew it without
        self._valid_until = 0.0
        for key, value in list(self._content.items()):
            await self._put(key, value)
        self._valid_until = sent + self._ttl_s

    async def put(self, key: str, value: bytes) -> None:
        """See Lease."""
        self._content[key] = value
        await self._put(key, value)

    async def _put(self, key: str, value: bytes) -> None:
        request = rpc_pb2.PutRequest(key=self._etcd.key(key), value=value, lease=self._id)
        await self._etcd.call(self._etcd.kv.Put, request)

    async def keep(self) -> None:
        """Renew every third of the time to live until revoked; errors are retried with jittered back-off."""
        retry_s = _FIRST_RETRY_S
        pause_s = self._ttl_s / 3
        while not self._ended:
            await asyncio.sleep(pause_s)
            try:
                async with self._turn:
                    await self._renew_or_grant()
                pause_s, retry_s = self._ttl_s / 3, _FIRST_RETRY_S
            except RegistryUnavailable as error:
                _log.warning("lease not renewed", reason=error.message)
                pause_s = retry_s * random.uniform(0.5, 1.5)
                retry_s = min(retry_s * 2, _MOST_RETRY_S)

    async def _renew_or_grant(self) -> None:
        if self._ended:
            return
        if self._clock.now() >= self._valid_until or not await self._renew():
            _log.warning("lease lost, registering again", keys=list(self._content))
            await self.grant()

    async def _renew(self) -> bool:
        """False when etcd does not know the lease, or one of its keys, any more."""
        sent = self._clock.now()
        request = rpc_pb2.LeaseKeepAliveRequest(ID=self._id)

        async def once() -> AsyncGenerator[rpc_pb2.LeaseKeepAliveRequest, None]:
            yield request

        limit_s = self._ttl_s / 3
        stream = self._etcd.leases.LeaseKeepAlive(
            once(), timeout=limit_s, metadata=self._etcd.metadata()
        )
        try:
            answer = await stream.read()
        except grpc.aio.AioRpcError as error:
            raise RegistryUnavailable(f"keep-alive: {error.code().name}") from error
        finally:
            stream.cancel()
        if answer is grpc.aio.EOF:
            raise RegistryUnavailable("keep-alive: the stream ended")
        if answer.TTL <= 0:
            return False
        self._valid_until = sent + self._ttl_s
        return True

    async def revoke(self) -> None:
        """See Lease."""
        self._ended = True
        try:
            async with self._turn:
                request = rpc_pb2.LeaseRevokeRequest(ID=self._id)
                await self._etcd.call(self._etcd.leases.LeaseRevoke, request)
        except RegistryUnavailable as error:
            _log.warning(
                "lease not revoked; it ends by itself", reason=error.message, ttl_s=self._ttl_s
            )
