"""The cluster's key outlives the registry's memory."""

from __future__ import annotations

import asyncio

from xllm_py.base.clock import RealClock
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.registry.cluster_key import cluster_key_of, keep_cluster_key
from xllm_py.registry.memory import MemoryRegistry, Store


async def test_a_key_that_is_gone_is_put_again_by_who_has_it() -> None:
    registry, tasks = MemoryRegistry(Store(RealClock())), TaskFamily("test")
    key = await cluster_key_of(registry)
    tasks.start(keep_cluster_key(registry, key), name="keep")
    await asyncio.sleep(0)
    for _ in range(2):
        known, revision = await registry.entries(keys.CLUSTER_KEY)
        assert await registry.delete(keys.CLUSTER_KEY)
        async with asyncio.timeout(10):
            async for changes in registry.watch(keys.CLUSTER_KEY, known, revision):
                if changes[-1].value is not None:
                    break
    assert await cluster_key_of(registry) == key
    await tasks.close()
    await registry.close()


async def test_who_comes_first_to_a_registry_that_was_emptied_waits_for_the_key_of_the_others() -> (
    None
):
    registry = MemoryRegistry(Store(RealClock()))
    newcomer = asyncio.ensure_future(cluster_key_of(registry, patience_s=30.0))
    await asyncio.sleep(0.2)
    assert not newcomer.done()
    of_all = await cluster_key_of(registry)  # who has one puts it there, as a master makes it
    assert await newcomer == of_all
    await registry.close()


async def test_without_any_others_the_key_is_made_when_patience_is_over() -> None:
    registry = MemoryRegistry(Store(RealClock()))
    made = await cluster_key_of(registry, patience_s=0.2)
    assert await cluster_key_of(registry) == made
    await registry.close()


async def test_a_key_that_another_made_is_left_alone() -> None:
    registry, tasks = MemoryRegistry(Store(RealClock())), TaskFamily("test")
    other = await cluster_key_of(registry)
    tasks.start(keep_cluster_key(registry, b"m" * 32), name="keep")
    for _ in range(50):
        await asyncio.sleep(0)
    assert await cluster_key_of(registry) == other
    await tasks.close()
    await registry.close()
