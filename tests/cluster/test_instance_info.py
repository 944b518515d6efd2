"""A card survives its JSON; whatever else stands under its key in the registry is refused, never raised through."""

from __future__ import annotations

import json

import pytest

from xllm_py.base.errors import ProtocolViolation
from xllm_py.cluster.instance_info import (
    MAX_CARD_BYTES,
    Card,
    card_from_json,
    card_key,
    card_to_json,
)

KEY = card_key(b"k" * 32)
CARD = Card(name="h:8010", rpc_address="h:7777", type=1, incarnation_id="life", addrs=("h:26000",))
BODY = {"name": "h:8010", "rpc_address": "h:7777", "type": 1, "incarnation_id": "life"}


def test_a_card_comes_back_as_it_was() -> None:
    assert card_from_json(card_to_json(CARD, KEY), KEY) == CARD


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 30_000,
        b" " * (MAX_CARD_BYTES + 1),
        json.dumps(BODY).encode(),
        json.dumps({**BODY, "mac": 1}).encode(),
        json.dumps({**BODY, "mac": "\ud800"}).encode(),
        card_to_json(CARD, card_key(b"x" * 32)),
    ],
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        card_from_json(raw, KEY)


def test_a_card_is_refused_however_deep_it_is_nested() -> None:
    """Every depth around the interpreter's limit: reading gives up at another one than writing again for the MAC."""
    head = json.dumps(BODY).encode()[:-1] + b',"more":'
    for depth in range(700, 1100):
        with pytest.raises(ProtocolViolation):
            card_from_json(head + b"[" * depth + b"]" * depth + b"}", KEY)
