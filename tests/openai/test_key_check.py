"""Who may come in."""

from __future__ import annotations

import pytest

from tests.openai.support import EchoBackend
from xllm_py.openai.backend import Readiness
from xllm_py.openai.key_check import KeyRing

RING = KeyRing({"ann": "first-key", "bob": "second-key"})


@pytest.mark.parametrize(
    ("header", "holder"),
    [
        ("Bearer first-key", "ann"),
        ("bearer  second-key", "bob"),
        ("Bearer first-ke", None),
        ("Bearer ", None),
        ("Basic first-key", None),
        ("first-key", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_known_key_has_a_holder(header, holder):
    assert RING.holder(header) == holder


def test_an_empty_ring_lets_everybody_in():
    assert KeyRing({}).holder(None) == ""


async def test_cached_prefixes_are_shared_within_a_tenant_and_a_salt_only(make):
    door = make(api_keys={"ann": "first-key", "bob": "second-key"})
    salts = []
    for key, fields in (
        ("first-key", {}),
        ("first-key", {"cache_salt": "x"}),
        ("second-key", {}),
        ("second-key", {"cache_salt": "x"}),
        ("first-key", {}),
    ):
        body = {"model": "tiny", "prompt": "hi", **fields}
        known = {"authorization": f"Bearer {key}"}
        answer = await door.ask("POST", "/v1/completions", body, headers=known)
        assert answer.status == 200, answer
        salts.append(door.backend.submissions[-1].cache_salt)
    assert len(set(salts[:4])) == 4
    assert salts[4] == salts[0]


async def test_without_keys_and_salt_everybody_shares(make):
    door = make()
    await door.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "hi"})
    assert door.backend.submissions[-1].cache_salt == ""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/embeddings"),
        ("GET", "/nothing"),
        ("GET", "/health/../v1/models"),
        ("GET", "//health"),
    ],
)
async def test_every_other_route_needs_a_key(make, method, path):
    door = make(api_keys={"ann": "first-key"})
    answer = await door.ask(method, path, {} if method == "POST" else None)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    known = {"authorization": "Bearer first-key"}
    answer = await door.ask(method, path, {} if method == "POST" else None, headers=known)
    assert answer.status != 401


async def test_without_a_key_readiness_gives_no_reasons(make):
    state = Readiness(ready=False, reasons=("no_instances",), details=("why",))
    door = make(backend=EchoBackend(state=state), api_keys={"ann": "first-key"})
    assert (await door.ask("GET", "/ready")).json() == {"status": "not_ready"}
    known = {"authorization": "Bearer first-key"}
    answer = await door.ask("GET", "/ready", headers=known)
    assert answer.json()["reasons"] == ["no_instances"]
