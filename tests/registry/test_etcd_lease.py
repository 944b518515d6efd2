"""A lease that ends on purpose while it is being renewed is not taken again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from xllm_py.base.clock import RealClock
from xllm_py.base.tasks import TaskFamily
from xllm_py.registry.etcd_lease import EtcdLease
from xllm_py.registry.etcd_stubs import rpc_pb2


class FakeEtcd:
    """Unary calls are noted; a keep-alive is answered when the test says so, with what etcd would say then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.revoked = False
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.leases = SimpleNamespace(
            LeaseGrant="grant", LeaseRevoke="revoke", LeaseKeepAlive=self._keep_alive
        )
        self.kv = SimpleNamespace(Put="put")

    def key(self, key: str) -> bytes:
        return key.encode()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def call(self, method: Any, request: Any) -> Any:
        self.calls.append(method)
        self.revoked = self.revoked or method == "revoke"
        return rpc_pb2.LeaseGrantResponse(ID=len(self.calls))

    def _keep_alive(self, requests: Any, **_: Any) -> Any:
        return SimpleNamespace(read=self._read, cancel=lambda: None)

    async def _read(self) -> Any:
        self.asked.set()
        await self.answer.wait()
        return rpc_pb2.LeaseKeepAliveResponse(TTL=0 if self.revoked else 3)


async def test_a_lease_revoked_in_mid_renewal_puts_nothing_again() -> None:
    etcd, tasks = FakeEtcd(), TaskFamily("test")
    lease = EtcdLease(etcd, 1, RealClock())
    await lease.grant()
    await lease.put("card", b"here")
    keeping = tasks.start(lease.keep(), name="keep")
    await asyncio.wait_for(etcd.asked.wait(), 5)
    revoking = tasks.start(lease.revoke(), name="revoke")
    await asyncio.sleep(0)  # let it go as far as it can
    etcd.answer.set()
    await asyncio.wait_for(asyncio.gather(keeping, revoking), 5)
    assert etcd.calls == ["grant", "put", "revoke"]
    await tasks.close()
