"""One suite for every registry: the fake, the embedded server through our client, and a real etcd."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import pytest

from tests.registry.real_etcd import RealEtcd, real_etcd
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import open_registry
from xllm_py.registry.base import Entry, Put, Registry
from xllm_py.registry.embedded import serve_embedded
from xllm_py.registry.etcd import EtcdRegistry
from xllm_py.registry.etcd_stubs import rpc_pb2
from xllm_py.registry.memory import MemoryRegistry, Store

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd on PATH")
_numbers = itertools.count()
KINDS = ["memory", "embedded", pytest.param("etcd", marks=[pytest.mark.etcd, needs_etcd])]


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEtcd]:
    with real_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture(params=KINDS)
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    """Each test has a namespace of its own."""
    if request.param == "memory":
        yield MemoryRegistry(Store(RealClock()))
        return
    server = None
    if request.param == "embedded":
        server = await serve_embedded("127.0.0.1:0", clock=RealClock())
        address = f"127.0.0.1:{server.port}"
    else:
        address = request.getfixturevalue("etcd_server").address
    config = EtcdSlice(address=address, namespace=f"/test{next(_numbers)}/", start_timeout_s=10)
    client = await open_registry(config, RealClock())
    yield client
    await client.close()
    if server is not None:
        await server.close()


async def next_of(
    watch: AsyncGenerator[list[Entry], None], count: int
) -> list[tuple[str, bytes | None]]:
    """The next changes as (key, value)."""
    found: list[tuple[str, bytes | None]] = []
    async with asyncio.timeout(15):
        while len(found) < count:
            found += [(entry.key, entry.value) for entry in await anext(watch)]
    return found


async def test_a_put_value_is_read_back_and_deleted(registry: Registry) -> None:
    assert await registry.get("a") is None
    await registry.put("a", b"1")
    assert await registry.get("a") == b"1"
    assert await registry.delete("a")
    assert not await registry.delete("a")
    assert await registry.get("a") is None


async def test_a_swap_that_wants_a_key_absent_keeps_the_first_value(registry: Registry) -> None:
    assert await registry.swap({"key": 0}, [Put(key="key", value=b"first")])
    assert not await registry.swap({"key": 0}, [Put(key="key", value=b"second")])
    assert await registry.get("key") == b"first"


async def test_a_swap_writes_all_or_nothing_and_only_over_what_was_seen(registry: Registry) -> None:
    await registry.put("term", b"1")
    ((seen, *_), _) = await registry.entries("term")
    lease = await registry.lease(60)
    puts = [Put(key="master", value=b"a", lease=lease.id), Put(key="term", value=b"2")]
    assert await registry.swap({"master": 0, "term": seen.revision}, puts)
    assert not await registry.swap({"master": 0, "term": seen.revision}, puts)
    late = [Put(key="other", value=b"x"), Put(key="term", value=b"3")]
    assert not await registry.swap({"term": seen.revision}, late)
    assert await registry.get("other") is None
    assert await registry.get("term") == b"2"
    assert lease.left_s > 0
    await lease.revoke()
    assert await registry.get("master") is None
    assert await registry.get("term") == b"2"


async def test_a_swap_under_a_lease_that_is_gone_writes_nothing(registry: Registry) -> None:
    lease = await registry.lease(60)
    await lease.revoke()
    with pytest.raises(RegistryUnavailable):
        await registry.swap({}, [Put(key="master", value=b"a", lease=lease.id)])
    assert await registry.get("master") is None


async def test_a_list_has_the_prefix_only(registry: Registry) -> None:
    for key in ("XLLM:P:a", "XLLM:P:b", "XLLM:Q:c", "XLLN"):
        await registry.put(key, key.encode())
    entries, revision = await registry.entries("XLLM:P:")
    assert [(entry.key, entry.value) for entry in entries] == [
        ("XLLM:P:a", b"XLLM:P:a"),
        ("XLLM:P:b", b"XLLM:P:b"),
    ]
    assert revision >= max(entry.revision for entry in entries)


async def test_a_watch_tells_all_changes_after_the_list_in_order(registry: Registry) -> None:
    await registry.put("w:a", b"0")
    entries, revision = await registry.entries("w:")
    await registry.put("w:a", b"1")  # before the watch begins
    watch = registry.watch("w:", entries, revision)
    await registry.put("other", b"x")
    await registry.put("w:b", b"2")
    await registry.delete("w:a")
    assert await next_of(watch, 3) == [("w:a", b"1"), ("w:b", b"2"), ("w:a", None)]
    await watch.aclose()


async def test_a_revoked_lease_deletes_its_keys(registry: Registry) -> None:
    entries, revision = await registry.entries("c:")
    lease = await registry.lease(5)
    await lease.put("c:card", b"here")
    watch = registry.watch("c:", entries, revision)
    await lease.revoke()
    assert await next_of(watch, 2) == [("c:card", b"here"), ("c:card", None)]
    await watch.aclose()


async def test_a_lease_lives_while_it_is_kept(registry: Registry) -> None:
    lease = await registry.lease(2)
    await lease.put("kept", b"1")
    await asyncio.sleep(3.5)  # longer than etcd's shortest lease: only keep-alives explain the key
    assert await registry.get("kept") == b"1"
    await lease.revoke()
    assert await registry.get("kept") is None


async def test_a_key_that_is_no_text_disturbs_nobody(registry: Registry) -> None:
    entries, revision = await registry.entries("k:")
    watch = registry.watch("k:", entries, revision)
    await put_raw(registry, b"k:\xff")
    await registry.put("k:z", b"1")
    changes = await next_of(watch, 2)
    assert changes[1] == ("k:z", b"1")
    assert len((await registry.entries("k:"))[0]) == 2
    await watch.aclose()


async def put_raw(registry: Registry, key: bytes) -> None:
    """As somebody else would, who knows nothing of our keys."""
    if isinstance(registry, EtcdRegistry):
        await registry.kv.Put(rpc_pb2.PutRequest(key=registry.key("") + key, value=b"x"))
    else:
        assert isinstance(registry, MemoryRegistry)
        registry._store.put(key, b"x")
