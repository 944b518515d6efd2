"""Floor 3: who is there. etcd, an etcd-compatible server for one box, and a fake, behind one protocol."""

from __future__ import annotations

from pathlib import Path

from xllm_py.base.clock import Clock
from xllm_py.base.errors import UsageError
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry.base import Registry

__all__ = ["Registry", "open_registry"]


async def open_registry(config: EtcdSlice, clock: Clock) -> Registry:
    """Connect and check that the registry answers. Raises RegistryUnavailable with cause and fix after start_timeout_s."""
    from xllm_py.registry.etcd import EtcdRegistry

    registry = EtcdRegistry(config, authority=_read_authority(config.ca_file), clock=clock)
    try:
        await registry.connect()
    except BaseException:
        await registry.close()
        raise
    return registry


def _read_authority(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--tls_ca_file={path} cannot be read ({error.strerror}). Check the path"
        ) from error
