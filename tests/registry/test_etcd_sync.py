"""First contact through the etcd3 library: over our stubs, with a limit, against whatever speaks etcd's API."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from tests.ports import free_port
from tests.registry.real_etcd import real_etcd
from xllm_py.base.clock import RealClock
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import etcd_sync
from xllm_py.registry.embedded import EmbeddedEtcd, serve_embedded
from xllm_py.registry.etcd_stubs import rpc_pb2, rpc_pb2_grpc

KEY = b"XLLM:"


@pytest.fixture
async def embedded() -> AsyncIterator[EmbeddedEtcd]:
    server = await serve_embedded("127.0.0.1:0", clock=RealClock())
    yield server
    await server.close()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    if shutil.which("etcd") is None:
        pytest.skip("no etcd on PATH")
    with real_etcd(tmp_path) as server:
        yield server.address


def config(address: str, **fields: str) -> EtcdSlice:
    return EtcdSlice(address=address, timeout_s=2.0, **fields)  # type: ignore[arg-type]  # fields by name


async def in_thread(address: str) -> etcd_sync.Greeting:
    return await asyncio.to_thread(etcd_sync.greet, config(address), KEY)


async def test_the_embedded_registry_says_who_it_is(embedded: EmbeddedEtcd) -> None:
    address = f"127.0.0.1:{embedded.port}"
    assert await in_thread(address) == etcd_sync.Greeting(address, "3.4.0")


@pytest.mark.etcd
def test_a_real_etcd_says_who_it_is(etcd: str) -> None:
    found = etcd_sync.greet(config(etcd), KEY)
    assert found.endpoint == etcd
    assert found.version.startswith("3.")


async def test_a_lease_of_another_life_of_the_registry_is_not_found() -> None:
    """Two daemons would keep one lease alive, and the record of one of them would be missing for ever."""
    granted = []
    for _ in range(2):
        server = await serve_embedded("127.0.0.1:0", clock=RealClock())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rpc_pb2_grpc.LeaseStub(channel)
            for _ in range(2):
                reply = await stub.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=5))
                granted.append(reply.ID)
        await server.close()
    assert len(set(granted)) == 4


async def test_the_first_endpoint_that_answers_counts(embedded: EmbeddedEtcd) -> None:
    alive = f"127.0.0.1:{embedded.port}"
    found = await in_thread(f"127.0.0.1:{free_port()},{alive}")
    assert found.endpoint == alive


def test_when_nobody_answers_the_last_error_says_so() -> None:
    with pytest.raises(grpc.RpcError) as caught:
        etcd_sync.greet(config(f"127.0.0.1:{free_port()}"), KEY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.etcd
def test_an_etcd_that_wants_no_password_is_told_apart_from_none(etcd: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        etcd_sync.greet(config(etcd, username="u", password="p"), KEY)
    assert "authentication is not enabled" in str(caught.value.details())


async def test_the_library_stands_on_our_stubs_and_leaves_no_thread(embedded: EmbeddedEtcd) -> None:
    before = {thread.name for thread in threading.enumerate()}
    await in_thread(f"127.0.0.1:{embedded.port}")
    assert sys.modules["etcd3"].etcdrpc.RangeRequest is rpc_pb2.RangeRequest
    started = {thread.name for thread in threading.enumerate()} - before
    assert {name for name in started if not name.startswith("asyncio_")} == set()
