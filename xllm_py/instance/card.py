"""What this instance says of itself in the registry (SPEC 4.2): from its configuration, and from what its engine found."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py import __version__
from xllm_py.cluster.instance_info import Card
from xllm_py.control.server import join_address
from xllm_py.instance.config import InstanceConfig
from xllm_py.wire.messages import Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """This life of the instance."""

    incarnation: str
    cluster_key: bytes
    http_port: int  # the real one
    started_ms: int = 0  # wall clock, for people


def make_card(
    config: InstanceConfig, ready: Ready, identity: Identity, *, control_port: int, state: str
) -> Card:
    """SPEC 4.2."""
    host = config.addresses.advertise_host
    replicas = config.num_replicas
    return Card(
        name=join_address(host, identity.http_port),
        rpc_address=join_address(host, control_port),
        type=config.cluster.role.value,
        incarnation_id=identity.incarnation,
        register_ts_ms=identity.started_ms,
        addrs=ready.kv_endpoints,
        ports=tuple(int(where.rpartition(":")[2]) for where in ready.kv_endpoints),
        dp_size=replicas,
        http_address=join_address(host, identity.http_port),
        version=__version__,
        state=state,
        model=config.served_names[0],
        served_names=config.served_names,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        sampling_defaults=dict(config.sampling_defaults),
        model_fingerprint=ready.model_fingerprint,
        dtype=ready.dtype,
        kv_dtype=ready.dtype,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks,
        kv_token_bytes=ready.kv_token_bytes,
        layout_fingerprint=ready.layout_fingerprint,
        layout=ready.layout,
        tp_size=config.engine.num_ranks // replicas,
        ep_size=config.engine.ranks.expert_groups,
        device_type=ready.device.partition(":")[0],
        device_ips=config.device_ips,
        enable_prefix_cache=config.engine.cache.enable_prefix_cache,
        enable_chunked_prefill=config.engine.scheduler.enable_chunked_prefill,
        max_seqs=replicas * config.engine.scheduler.max_seqs_per_batch,
        numerics_fingerprint=ready.numerics_fingerprint,
        flexible=config.cluster.flexible,
        kv_cache_transfer_mode="PULL" if config.engine.scheduler.kv_pull else "PUSH",
    )
