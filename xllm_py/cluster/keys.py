"""The etcd key layout (SPEC 4.1); the namespace prefix is the registry's business."""

from __future__ import annotations

from xllm_py.cluster.instance_info import Role

CLUSTER_KEY = "XLLM:CLUSTER:KEY"
SERVICES = "XLLM:SERVICE:"
ELECTED_MASTER = "XLLM:SERVICE:MASTER"
TERM = "XLLM:SERVICE:TERM"
EVERYTHING = "XLLM:"


def instance(role: Role, name: str) -> str:
    """Where an instance puts its card."""
    return f"XLLM:{role.name}:{name}"


def service(rpc_address: str) -> str:
    """Where a master puts its own record."""
    return f"{SERVICES}{rpc_address}"


def parse_instance(key: str) -> tuple[Role, str] | None:
    """(role, name) of an instance key, else None."""
    parts = key.split(":", 2)
    if len(parts) != 3 or parts[0] != "XLLM" or parts[1] not in Role.__members__ or not parts[2]:
        return None
    return Role[parts[1]], parts[2]
