"""One rank's KV port, and what it is for peers. Used by engine/__main__ on rank 0 and by engine/ranks on the others; imports no torch."""

from __future__ import annotations

from xllm_py.base.clock import RealClock
from xllm_py.core.config import EngineConfig
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.transport import mirrored
from xllm_py.transport.base import KvTransport
from xllm_py.transport.fabric import Fabric, open_fabric
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.transport.tcp_tls import KvTls


def open_port(config: EngineConfig, memory: KvMemory, share: Share) -> KvTransport:
    """Listen, with the cache of this rank behind. Raises PortInUse and other StartErrors."""
    place = config.ranks.place
    transport = TcpKvTransport(
        memory=memory,
        incarnation=config.incarnation,
        cluster_key=config.cluster_key,
        host=config.kv_host,
        port=config.kv_port + place if config.kv_port else 0,
        port_may_move=config.kv_port_may_move or place > 0,
        num_streams=config.kv_streams,
        first_stream=config.kv_first_stream,
        shared_memory=config.kv_transport == "auto",
        fabric=_fabric(config),
        tls=KvTls(config.kv_tls) if config.kv_tls is not None else None,
        share=share,
    )
    return mirrored.over(transport, memory)


def _fabric(config: EngineConfig) -> Fabric | None:
    if config.kv_transport in ("tcp", "auto"):
        return None
    return open_fabric(config.kv_transport, config.kv_host, RealClock())


def announced(config: EngineConfig, transport: KvTransport) -> str:
    """Where peers reach it, host:port."""
    host = config.kv_advertise_host or config.kv_host
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{transport.endpoint.rpartition(':')[2]}"
