"""A master's record survives its JSON and is believed only with the right key."""

from __future__ import annotations

import dataclasses
import json

import pytest

from xllm_py.base.errors import ProtocolViolation
from xllm_py.cluster.service_info import ServiceRecord, service_from_json, service_to_json

KEY = b"k" * 32
RECORD = ServiceRecord(
    name="h:8889", rpc_address="h:8889", http_address="h:8888", incarnation_id="life"
)


def test_a_record_comes_back_as_it_was() -> None:
    assert service_from_json(service_to_json(RECORD, KEY), KEY) == RECORD


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"127.0.0.1:8889",
        b"[]",
        b"{}",
        b'{"mac": 1}',
        b'{"mac": "\\ud800"}',
        b"[" * 3000,
        b"\xff",
        b" " * 5000,
        service_to_json(RECORD, b"x" * 32),
        service_to_json(dataclasses.replace(RECORD, rpc_address=""), KEY),
    ],
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        service_from_json(raw, KEY)


def test_a_changed_record_is_refused() -> None:
    body = json.loads(service_to_json(RECORD, KEY))
    body["rpc_address"] = "evil:1"
    with pytest.raises(ProtocolViolation, match="MAC"):
        service_from_json(json.dumps(body).encode(), KEY)
