"""The cluster key in the registry: the first daemon without a key file makes it, the others read it (SPEC 4.1)."""

from __future__ import annotations

import secrets

from xllm_py.base.errors import RegistryUnavailable
from xllm_py.cluster import keys
from xllm_py.registry.base import Registry

_KEY_BYTES = 32


async def cluster_key_of(registry: Registry) -> bytes:
    """32 bytes. Raises RegistryUnavailable."""
    made = secrets.token_bytes(_KEY_BYTES).hex().encode()
    await registry.put(keys.CLUSTER_KEY, made, create_only=True)
    text = await registry.get(keys.CLUSTER_KEY) or b""
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError as error:
        raise RegistryUnavailable(f"{keys.CLUSTER_KEY} in etcd is no hex; delete it") from error
    if len(key) != _KEY_BYTES:
        raise RegistryUnavailable(f"{keys.CLUSTER_KEY} in etcd is not 32 bytes; delete it")
    return key
