"""A lease that ends on purpose while it is being renewed is not taken again; one that was taken again in part is taken once more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_py.base.clock import RealClock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.base.tasks import TaskFamily
from xllm_py.registry.etcd_lease import EtcdLease
from xllm_py.registry.etcd_stubs import rpc_pb2


class FakeEtcd:
    """Unary calls are noted; a keep-alive is answered when the test says so, with what etcd would say then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.revoked = False
        self.failing: dict[str, bool] = {}  # methods whose next call fails
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
        if self.failing.pop(method, False):
            raise RegistryUnavailable("it answers no more")
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


async def test_a_lease_under_which_not_everything_stands_is_not_valid_and_is_granted_again() -> (
    None
):
    """An etcd that is killed while it comes back: it grants, and does not put any more; asked later, it knows the lease."""
    etcd = FakeEtcd()
    etcd.answer.set()
    lease = EtcdLease(etcd, 30, RealClock())
    await lease.grant()
    await lease.put("card", b"here")
    etcd.failing["put"] = True
    with pytest.raises(RegistryUnavailable):
        await lease.grant()
    assert lease.left_s <= 0
    etcd.calls.clear()
    await lease._renew_or_grant()
    assert etcd.calls == ["grant", "put"]
    assert lease.left_s > 0
