"""The cluster key in the registry: the first daemon without a key file makes it, the others read it (SPEC 4.1).

A registry that comes back empty gets it again from those who have it, so that who starts later is still of the same cluster.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from xllm_py.base import log
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.cluster import keys
from xllm_py.registry.base import Entry, Put, Registry

_KEY_BYTES = 32
_RETRY_S = 1.0
_LOOK_S = 0.1

_log = log.get(__name__)


async def cluster_key_of(registry: Registry, *, patience_s: float = 0.0) -> bytes:
    """32 bytes. Raises RegistryUnavailable.

    patience_s: how long one that is not there is waited for before it is made: those who have it put it into a registry that came back empty
    within three seconds, and a daemon that starts just then would be of a cluster of its own.
    """
    for _ in range(round(patience_s / _LOOK_S)):
        if await registry.get(keys.CLUSTER_KEY) is not None:
            break
        await asyncio.sleep(_LOOK_S)
    made = secrets.token_bytes(_KEY_BYTES).hex().encode()
    await _create(registry, made)
    text = await registry.get(keys.CLUSTER_KEY) or b""
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError as error:
        raise RegistryUnavailable(f"{keys.CLUSTER_KEY} in etcd is no hex; delete it") from error
    if len(key) != _KEY_BYTES:
        raise RegistryUnavailable(f"{keys.CLUSTER_KEY} in etcd is not 32 bytes; delete it")
    return key


async def _create(registry: Registry, value: bytes) -> None:
    """Put it unless there is one."""
    await registry.swap({keys.CLUSTER_KEY: 0}, [Put(key=keys.CLUSTER_KEY, value=value)])


async def keep_cluster_key(registry: Registry, key: bytes) -> None:
    """Put the key again whenever it is gone, for ever. A key that another daemon made meanwhile is left alone, and told."""
    known, revision = await _put_and_list(registry, key)
    async for changes in registry.watch(keys.CLUSTER_KEY, known, revision):
        if any(entry.value is None for entry in changes):
            await _put_and_list(registry, key)


async def _put_and_list(registry: Registry, key: bytes) -> tuple[Sequence[Entry], int]:
    while True:
        try:
            await _create(registry, key.hex().encode())
            known, revision = await registry.entries(keys.CLUSTER_KEY)
        except RegistryUnavailable:
            await asyncio.sleep(_RETRY_S)
            continue
        if any(entry.value != key.hex().encode() for entry in known):
            _log.error("another cluster key stands in etcd; restart the daemons of one of the two")
        return known, revision
