"""What a master says of itself under XLLM:SERVICE:<rpc_address> (SPEC 4.1): JSON, signed like a card.

Written by master/daemon; instances read it to learn where heartbeats and outputs go. One that does not parse, or is signed with
another key, is refused with a reason, never fatal.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from xllm_py.base.errors import ProtocolViolation
from xllm_py.base.hashing import mac, same
from xllm_py.cluster.instance_info import card_key

MAX_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRecord:
    """One master. Field names are those of the JSON."""

    name: str
    rpc_address: str  # host:rpc_port, what instances dial
    http_address: str
    incarnation_id: str
    version: str = ""


def service_to_json(record: ServiceRecord, cluster_key: bytes) -> bytes:
    """The record with its MAC, keys sorted."""
    body = dataclasses.asdict(record)
    return _canonical({**body, "mac": _mac(body, cluster_key)})


def service_from_json(raw: bytes, cluster_key: bytes) -> ServiceRecord:
    """Parse and verify; unknown fields are covered by the MAC and otherwise ignored. Raises ProtocolViolation."""
    if len(raw) > MAX_BYTES:
        raise ProtocolViolation(f"service record of {len(raw)} bytes; at most {MAX_BYTES} are read")
    try:
        body: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation("service record is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolViolation("service record is not a JSON object")
    given = body.pop("mac", "")
    wanted = _mac(body, cluster_key)
    if not isinstance(given, str) or not same(given.encode(errors="replace"), wanted.encode()):
        raise ProtocolViolation("service record's MAC is wrong; is the cluster key the same?")
    names = [field.name for field in dataclasses.fields(ServiceRecord)]
    values = {name: body.get(name, "") for name in names}
    if not all(isinstance(value, str) for value in values.values()):
        raise ProtocolViolation("service record has a field that is no text")
    if not values["rpc_address"] or not values["incarnation_id"]:
        raise ProtocolViolation("service record lacks its address or incarnation")
    return ServiceRecord(**values)


def _mac(body: dict[str, Any], cluster_key: bytes) -> str:
    return mac(card_key(cluster_key), _canonical(body)).hex()


def _canonical(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError as error:  # writing gives up a little earlier than reading
        raise ProtocolViolation("service record is nested too deep") from error
