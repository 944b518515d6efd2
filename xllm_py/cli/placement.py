"""Where an instance computes, from its flags: devices, and how they are shared out among ranks, nodes and replicas (SPEC 6.10). Called by cli/xllm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_py.cli import rules
from xllm_py.core.config import AUTO_DEVICE, RanksConfig

_NPU_BLOCK = 128
_RETRY_S = 1.5  # how long one of --max_reconnect_count lasts
_DEVICE = re.compile(r"(cpu|cuda|npu|mlu):[0-9]{1,3}")


def named_devices(causes: rules.Causes, values: Mapping[str, Any]) -> tuple[str, ...]:
    """`type:index`; empty or `auto`: the engine looks what is there."""
    if values["devices"].strip() in ("", AUTO_DEVICE) and values["device_id"] < 0:
        return (AUTO_DEVICE,)
    names = tuple(part.strip() for part in values["devices"].split(",") if part.strip())
    for name in names:
        causes.need(
            _DEVICE.fullmatch(name) is not None,
            f"--devices: '{name}' is no device. Write type:index, as cpu:0, cuda:0 or npu:0",
        )
    causes.need(
        len({name.partition(":")[0] for name in names}) <= 1, "--devices mixes types. Use one"
    )
    causes.need(
        len(set(names)) == len(names) or all(name.startswith("cpu:") for name in names),
        "--devices names a device twice. Name each once",
    )
    if values["device_id"] >= 0 and names:
        same = all(name.endswith(f":{values['device_id']}") for name in names)
        causes.need(same, "--device_id contradicts --devices. Pass one of them")
    size = values["block_size"]
    causes.need(
        size % _NPU_BLOCK == 0 or not any(name.startswith("npu:") for name in names),
        f"--block_size={size}: attention on npu wants blocks of {_NPU_BLOCK} tokens or a multiple. Pass --block_size={_NPU_BLOCK}",
    )
    if not values["enable_deterministic"] and not any(name.startswith("cuda:") for name in names):
        causes.warn(
            "--enable_deterministic=false is without effect: cpu and npu have no faster products"
        )
    return names or (f"cpu:{max(0, values['device_id'])}",)


def ranks_of(
    causes: rules.Causes, values: Mapping[str, Any], devices: Sequence[str]
) -> RanksConfig:
    """Where this node stands among those of the instance (SPEC 6.10)."""
    nnodes, split = values["nnodes"], values["enable_disagg_pd"]
    causes.need(nnodes >= 1, f"--nnodes={nnodes}. Use 1 or more")
    causes.need(
        nnodes == 1 or not split or bool(values["cluster_key_file"]),
        "the nodes of an instance that hands over need one key. Pass --cluster_key_file, the same on each, or --nnodes=1",
    )
    causes.need(
        nnodes * len(devices) == 1 or not values["profile_steps"],
        "--profile_steps times one rank. Pass one device and --nnodes=1",
    )
    world, groups = nnodes * len(devices), values["ep_size"]
    ranks = world // _replicas(causes, values, len(devices))
    causes.need(
        groups >= 1 and ranks % groups == 0,
        f"--ep_size={groups} does not divide the {ranks} devices that compute together. Use a number that does",
    )
    if nnodes == 1:
        return RanksConfig(expert_groups=groups)
    address = values["master_node_addr"]
    host, _, port = address.rpartition(":")
    causes.need(
        bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536,
        f"--master_node_addr={address} is no host:port. Pass where node 0 listens for the others",
    )
    return RanksConfig(
        nnodes=nnodes,
        expert_groups=groups,
        node_rank=values["node_rank"],
        address=address,
        patience_s=_RETRY_S * max(1, values["max_reconnect_count"]),
    )


def _replicas(causes: rules.Causes, values: Mapping[str, Any], local: int) -> int:
    """Engines of the instance; 1 when what was asked for cannot be."""
    count = values["dp_size"]
    good = count >= 1 and local % count == 0
    causes.need(
        good,
        f"--dp_size={count} does not divide the {local} --devices. Use a number that does",
    )
    if count == 1 or not good:
        return 1
    causes.need(
        values["nnodes"] == 1,
        "--dp_size over several nodes is not built. Start an instance on each node instead",
    )
    causes.need(
        values["kv_transport"] in ("tcp", "auto"),
        f"--dp_size and --kv_transport={values['kv_transport']} do not go together. Use tcp or auto",
    )
    return int(count)
