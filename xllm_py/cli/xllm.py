"""`xllm`: flags to InstanceConfig, then instance/daemon. Nothing heavy is imported before the configuration is known to be good."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_py.base.errors import UsageError
from xllm_py.base.process import pin
from xllm_py.cli import rules, xllm_flags
from xllm_py.cli.cores import cores
from xllm_py.cli.entry import run_command
from xllm_py.cli.flags import FlagCommand, Given, echo_given
from xllm_py.cli.generation_config import sampling_defaults
from xllm_py.cli.hccn import device_ips
from xllm_py.cli.mlu import normalize_mlu
from xllm_py.cli.model_path import find_model
from xllm_py.cli.placement import named_devices, ranks_of
from xllm_py.cluster.instance_info import Role
from xllm_py.core.config import (
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from xllm_py.instance.config import AddressSlice, ClusterSlice, InstanceConfig

INTRO = "xllm: one inference instance. A role, a model, a device:\n  xllm --model=FOLDER --devices=cpu:0"
_BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FINITE = {"rpc_channel_timeout_ms": 5000, "rpc_idle_timeout_s": 600}
_NOT_BUILT = {
    "num_speculative_tokens": 0,
    "enable_pd_ooc": False,
    "kv_split_size": 1,
    "cp_size": 1,
    "kv_cache_dtype": "auto",
}
_KNOWN = {  # words that flags take
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "load_format": ("auto", "dummy"),
    "generation_config": ("auto", "none"),
    "priority_strategy": ("fcfs", "priority", "deadline"),
    "logprobs_mode": ("raw", "processed"),
    "kv_transport": ("tcp", "auto", "nixl", "mooncake"),
    "quantization": ("w8a8", ""),
}


def build(given: Given) -> InstanceConfig:
    """Check every rule of SPEC section 2; raise UsageError with all causes at once, or ModelLoadError."""
    causes = rules.Causes()
    values = normalize_mlu(causes, rules.finite(causes, given.values, _FINITE))
    given = dataclasses.replace(given, values=values)
    _check_simple(causes, values)
    _check_kv_link(causes, values)
    rules.foreign_environment(causes)
    role = _role(causes, values)
    host = values["host"] or "127.0.0.1"
    addresses = _addresses(causes, given, host)
    etcd = rules.etcd(causes, values, values["etcd_ttl"])
    routed = _is_routed(causes, given)
    tls = rules.tls(causes, values)
    cluster = ClusterSlice(
        tls=tls,
        role=role,
        enable_disagg_pd=values["enable_disagg_pd"],
        flexible=_is_flexible(causes, values, role),
        routed=routed,
        etcd=etcd,
        cluster_key=rules.security(causes, values, host, has_peers=routed),
        heart_beat_interval_s=values["heart_beat_interval"],
        rpc_timeout_s=values["rpc_channel_timeout_ms"] / 1000,
    )
    http = rules.http(causes, values, values["max_concurrent_requests"])
    log = rules.logs(causes, values)
    devices = named_devices(causes, values)
    ips = device_ips(causes, given, devices)
    ranks = ranks_of(causes, values, devices)
    values = _overlap(causes, values, role, ranks.nnodes * len(devices))
    given = dataclasses.replace(given, values=values)
    affinity = cores(causes, values)
    points = rules.failpoints_of(causes, values, cluster.cluster_key)
    if causes.lines:
        raise UsageError("\n".join(causes.lines))
    folder = find_model(
        values["model"], values["model_root"] or os.environ.get("XLLM_MODEL_ROOT", "")
    )
    defaults = sampling_defaults(causes, folder) if values["generation_config"] == "auto" else {}
    names = [values["model_id"] or folder.name, *values["served_model_name"].split(",")]
    return InstanceConfig(
        model_path=str(folder),
        served_names=tuple(dict.fromkeys(name for name in names if name)),
        num_replicas=values["dp_size"],
        engine=dataclasses.replace(
            _engine(given, str(folder), devices, host), kv_tls=tls, ranks=ranks, failpoints=points
        ),
        addresses=addresses,
        http=http,
        cluster=cluster,
        log=log,
        cpu_affinity=affinity,
        device_ips=ips,
        stalled_after_s=values["health_check_interval_ms"] / 1000,
        random_seed=values["random_seed"],
        sampling_defaults=defaults,
        warnings=(*given.warnings, *causes.warnings),
        given=echo_given(given),
    )


def _check_simple(causes: rules.Causes, values: Mapping[str, Any]) -> None:
    need = causes.need
    need(bool(values["model"]), "--model is missing. Pass a model folder")
    need(
        values["backend"] in ("", "llm"),
        f"--backend={values['backend']} is not built. Leave it empty",
    )
    need(values["task"] == "generate", f"--task={values['task']} is not built. Use generate")
    for name, only in _NOT_BUILT.items():
        need(values[name] == only, f"--{name}={values[name]} is not built yet. Use {only}")
    need(
        values["block_size"] in _BLOCK_SIZES,
        f"--block_size={values['block_size']}. Use 1, 2, 4 ... 256",
    )
    need(
        0 < values["max_memory_utilization"] <= 1,
        "--max_memory_utilization must lie in (0, 1]. Use 0.8",
    )
    threshold = "prefill_scheduling_memory_usage_threshold"
    need(0 < values[threshold] <= 1, f"--{threshold} must lie in (0, 1]. Use 0.95")
    chunk = values["max_tokens_per_chunk_for_prefill"]
    need(
        chunk == -1 or chunk >= 1,
        f"--max_tokens_per_chunk_for_prefill={chunk}. Use -1 or at least 1",
    )
    for name, known in _KNOWN.items():
        need(
            values[name] in known,
            f"--{name}={values[name]} is unknown. Use {', '.join(filter(None, known))}",
        )
    need(2 <= values["etcd_ttl"] <= 60, f"--etcd_ttl={values['etcd_ttl']}. Use 2 to 60 s")
    need(
        0.05 <= values["heart_beat_interval"] <= 10,
        "--heart_beat_interval must lie in 0.05 to 10 s. Use 0.1",
    )
    need(
        0 <= values["node_rank"] < max(1, values["nnodes"]),
        "--node_rank must lie below --nnodes. Use 0",
    )
    rules.at_least(
        causes,
        values,
        0,
        "max_model_len",
        "cpu_threads",
        "max_cache_size",
        "max_concurrent_requests",
    )
    rules.at_least(causes, values, -1, "random_seed", "device_id")
    rules.at_least(
        causes, values, 1, "max_tokens_per_batch", "max_seqs_per_batch", "request_queue_size"
    )
    rules.at_least(causes, values, 1, "rpc_channel_timeout_ms", "health_check_interval_ms")
    rules.at_least(causes, values, 0.001, "grant_ttl_s", "handoff_hold_s")


def _check_kv_link(causes: rules.Causes, values: Mapping[str, Any]) -> None:
    need, mode = causes.need, values["kv_cache_transfer_mode"]
    need(mode in ("PUSH", "PULL"), f"--kv_cache_transfer_mode={mode}. Use PUSH or PULL")
    need(1 <= values["kv_streams"] <= 16, f"--kv_streams={values['kv_streams']}. Use 1 to 16")


def _role(causes: rules.Causes, values: Mapping[str, Any]) -> Role:
    word, split = values["instance_role"], values["enable_disagg_pd"]
    known = ", ".join(Role.__members__)
    if word not in Role.__members__:
        causes.need(False, f"--instance_role={word} is unknown. Use {known}")
        return Role.DEFAULT
    role = Role[word]
    if split:
        causes.need(
            role is not Role.DEFAULT,
            "--enable_disagg_pd needs a role. Pass --instance_role=PREFILL or DECODE",
        )
        causes.need(
            bool(values["etcd_addr"]),
            "--enable_disagg_pd needs a registry. Pass --etcd_addr=host:port",
        )
    else:
        causes.need(
            role is Role.DEFAULT, f"--instance_role={word} needs --enable_disagg_pd=true. Pass it"
        )
    return role


def _overlap(
    causes: rules.Causes, values: dict[str, Any], role: Role, num_devices: int
) -> dict[str, Any]:
    """--enable_schedule_overlap as it can be had."""
    name, why = "enable_schedule_overlap", ""
    if role is Role.PREFILL:
        why = "a prefill instance computes no steps of decodes"
    elif num_devices > max(1, values["dp_size"]):
        why = "several devices that compute together are told each step's tokens"
    if not values[name] or not why:
        return values
    causes.warn(f"--{name}: true -> false, because {why}")
    return {**values, name: False}


def _is_flexible(causes: rules.Causes, values: Mapping[str, Any], role: Role) -> bool:
    wanted = values["enable_flexible_role"]
    causes.need(
        not wanted or role in (Role.PREFILL, Role.DECODE),
        f"--enable_flexible_role is of a PREFILL or DECODE instance, not of {role.name}. Leave it out",
    )
    return bool(wanted)


def _is_routed(causes: rules.Causes, given: Given) -> bool:
    """Whether it registers: --enable_service_routing, else as soon as there is a registry."""
    values, name = given.values, "enable_service_routing"
    if not values["etcd_addr"]:
        causes.need(not values[name], f"--{name} needs a registry. Pass --etcd_addr=host:port")
        return False
    wanted = values[name] or name not in given.by_hand
    causes.need(
        wanted or not values["enable_disagg_pd"],
        f"--enable_disagg_pd implies --{name}. Leave --{name}=false out",
    )
    return bool(wanted)


def _addresses(causes: rules.Causes, given: Given, host: str) -> AddressSlice:
    values = given.values
    return AddressSlice(
        host=host,
        advertise_host=rules.announced(causes, values, host),
        port=rules.port(causes, values, "port"),
        disagg_pd_port=rules.port(causes, values, "disagg_pd_port"),
        disagg_pd_port_may_move="disagg_pd_port" not in given.by_hand,
    )


def _engine(given: Given, folder: str, devices: tuple[str, ...], host: str) -> EngineConfig:
    values = given.values
    chunk = values["max_tokens_per_chunk_for_prefill"]
    return EngineConfig(
        model_path=folder,
        dtype=values["dtype"],
        load_format=values["load_format"],
        quantization=values["quantization"],
        profile_to=str(Path(values["profile_steps"]).resolve()) if values["profile_steps"] else "",
        max_model_len=values["max_model_len"],
        logprobs_mode=values["logprobs_mode"],
        is_exact=values["enable_deterministic"],
        devices=devices,
        cpu_threads=values["cpu_threads"],
        cache=CacheConfig(
            block_size=values["block_size"],
            max_cache_bytes=values["max_cache_size"],
            max_memory_utilization=values["max_memory_utilization"],
            enable_prefix_cache=values["enable_prefix_cache"],
            prefix_seed=values["xxh3_128bits_seed"],
            poison=values["kv_poison"],
        ),
        scheduler=SchedulerConfig(
            max_tokens_per_batch=values["max_tokens_per_batch"],
            max_seqs_per_batch=values["max_seqs_per_batch"],
            enable_chunked_prefill=values["enable_chunked_prefill"],
            mix_batch=values["enable_mix_batch"],
            zero_evict=values["use_zero_evict"],
            max_tokens_per_chunk=values["max_tokens_per_batch"] if chunk == -1 else chunk,
            max_queue=min(values["request_queue_size"], values["max_queue_size"]),
            priority_strategy=values["priority_strategy"],
            online_preempts_offline=values["enable_online_preempt_offline"],
            prefill_usage_threshold=values["prefill_scheduling_memory_usage_threshold"],
            grant_ttl_s=values["grant_ttl_s"],
            handoff_hold_s=values["handoff_hold_s"],
            enable_local_decode=values["enable_local_decode"],
            overlap=values["enable_schedule_overlap"],
            kv_pull=values["kv_cache_transfer_mode"] == "PULL",
        ),
        kv_host=host,
        kv_advertise_host=values["advertise_host"] or host,
        kv_port=values["transfer_listen_port"],
        kv_listen=values["enable_disagg_pd"],
        kv_streams=values["kv_streams"],
        kv_transport=values["kv_transport"],
        kv_port_may_move="transfer_listen_port" not in given.by_hand,
        log_level=rules.logs(rules.Causes(), values).level,
        log_format=values["log_format"],
    )


def _run(given: Given) -> int:
    config = build(given)
    if config.cpu_affinity:
        pin(config.cpu_affinity)
    if config.engine.profile_to:
        from xllm_py.instance.step_profile import run as profile

        return profile(config)
    if config.engine.rank:
        from xllm_py.instance.rank_node import run as compute

        return compute(config)
    from xllm_py.instance.daemon import run

    return run(config)


COMMAND = FlagCommand(
    "xllm", INTRO, xllm_flags.TABLE, _run, ignored_prefixes=xllm_flags.IGNORED_PREFIXES
)


def main() -> None:
    """Console entry point."""
    run_command(COMMAND, sys.argv[1:])


if __name__ == "__main__":
    main()
