"""What an instance says of itself: the card in etcd (SPEC 4.2). JSON, signed with the cluster key.

Written by instance/announcer.py, read by master/instance_manager.py and by control services. A card that does not parse,
lacks a required field or carries a wrong MAC is refused with a reason, never fatal.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from xllm_py.base.errors import ProtocolViolation
from xllm_py.base.hashing import APPROXIMATE, derive_key, mac, same

MAX_CARD_BYTES = 64 * 1024


class Role(Enum):
    """What an instance does; the value is the number in the card's `type`."""

    DEFAULT = 0
    PREFILL = 1
    DECODE = 2
    MIX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One instance. Field names are those of the JSON."""

    name: str  # host:http_port as announced
    rpc_address: str  # host:disagg_pd_port
    type: int  # Role
    incarnation_id: str
    register_ts_ms: int = 0
    addrs: tuple[str, ...] = ()  # host:port of the KV listener of each rank
    ports: tuple[int, ...] = ()
    cluster_ids: tuple[int, ...] = ()
    dp_size: int = 1
    kv_split_size: int = 1
    backend_type: str = "xllm"
    http_address: str = ""
    version: str = ""
    state: str = "READY"  # JOINING, READY, DRAINING
    model: str = ""
    served_names: tuple[str, ...] = ()
    max_model_len: int = 0
    vocab_size: int = 0
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    model_fingerprint: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    block_size: int = 0
    num_blocks: int = 0
    kv_token_bytes: int = 0
    layout_fingerprint: str = ""
    layout: str = ""
    tp_size: int = 1
    ep_size: int = 1
    device_type: str = ""
    device_ips: tuple[str, ...] = ()  # on the devices' own network, as hccn.conf says
    enable_prefix_cache: bool = False
    enable_chunked_prefill: bool = True
    max_seqs: int = 0
    kv_transports: tuple[str, ...] = ("tcp",)
    kv_cache_transfer_mode: str = (
        "PUSH"  # of what it gives: it pushes, or the decode instance fetches (PULL)
    )
    numerics_fingerprint: str = ""
    flexible: bool = False  # PREFILL or DECODE, and the elected master may give it the other half

    @property
    def role(self) -> Role:
        """The role as an enum."""
        return Role(self.type)


_FIELDS = {each.name: each for each in dataclasses.fields(Card)}
_REQUIRED = ("name", "rpc_address", "type", "incarnation_id")


def card_key(cluster_key: bytes) -> bytes:
    """The key cards are signed with."""
    return derive_key(cluster_key, "cards")


def card_to_json(card: Card, key: bytes) -> bytes:
    """The card with its MAC over everything else, keys sorted."""
    body = {name: getattr(card, name) for name in _FIELDS}
    return _canonical({**body, "mac": mac(key, _canonical(body)).hex()})


def card_from_json(raw: bytes, key: bytes) -> Card:
    """Parse and verify. Unknown fields are covered by the MAC and otherwise ignored. Raises ProtocolViolation."""
    if len(raw) > MAX_CARD_BYTES:
        raise ProtocolViolation(f"card of {len(raw)} bytes; at most {MAX_CARD_BYTES} are read")
    try:
        body: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation("card is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolViolation("card is not a JSON object")
    for name in _REQUIRED:
        if name not in body:
            raise ProtocolViolation(f"card lacks the field {name}")
    given = body.pop("mac", "")
    wanted = mac(key, _canonical(body)).hex()
    if not isinstance(given, str) or not same(given.encode(errors="replace"), wanted.encode()):
        raise ProtocolViolation("card's MAC is wrong; do all daemons use the same cluster key?")
    return _build(body)


def _build(body: dict[str, Any]) -> Card:
    values: dict[str, Any] = {}
    for name, value in body.items():
        if name not in _FIELDS:
            continue
        values[name] = tuple(value) if isinstance(value, list) else value
    for name, value in values.items():
        wanted = str(_FIELDS[name].type).partition("[")[0]
        if type(value).__name__ != wanted:
            raise ProtocolViolation(f"card field {name} is a {type(value).__name__}, not {wanted}")
    for name, value in values.get("sampling_defaults", {}).items():
        if type(value) not in (int, float):
            raise ProtocolViolation(f"card field sampling_defaults: {name} is no number")
    if values["type"] not in {role.value for role in Role}:
        raise ProtocolViolation(f"card type {values['type']} is no role")
    return Card(**values)


def _canonical(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError as error:  # writing gives up a little earlier than reading
        raise ProtocolViolation("card is nested too deep") from error


_MUST_AGREE = (
    "model_fingerprint",
    "dtype",
    "kv_dtype",
    "layout",
    "layout_fingerprint",
)


def differences(giver: Card, taker: Card) -> list[str]:
    """What keeps two instances from exchanging KV, one sentence a field; empty when they fit."""
    return [
        f"{name} differs: {getattr(giver, name)} on {giver.name}, {getattr(taker, name)} on {taker.name}"
        for name in _MUST_AGREE
        if getattr(giver, name) != getattr(taker, name)
    ]


def inexact(giver: Card, taker: Card) -> str:
    """Why the text of this pair may not be, to the bit, that of one instance; empty when it is."""
    for card in (giver, taker):
        if card.numerics_fingerprint == APPROXIMATE:
            return f"{card.name} found at its start that its kernels are not exact"
    if giver.numerics_fingerprint != taker.numerics_fingerprint:
        return "numerics fingerprints differ: other kernels, or another --cpu_threads"
    return ""
