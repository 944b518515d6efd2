"""Roles that move, with two masters over one registry: one is elected, its word holds for both, and another one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.phases import body

PROMPT = [(7 * n) % 300 for n in range(40)]
NAMES = ("m1", "m2", "m3")


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("roles"), tiny_model) as made:
        made.start_registry()
        for name in ("master 1", "master 2"):
            made.start_master("--suspect_after_ms=1500", "--gone_after_ms=3000", name=name)
        for name in NAMES:
            made.start_instance(name, "MIX", "--block_size=16", "--enable_prefix_cache=false")
        made.wait_ready(*made.daemons[1:])
        yield made


def state(master: Daemon) -> dict[str, Any]:
    status, answer = master.request("GET", "/admin/instances")
    assert status == 200
    return dict(answer)


def duties(master: Daemon) -> dict[str, str]:
    """Port of an instance -> what it is there for."""
    rows = state(master)["instances"]
    return {
        row["name"].rpartition(":")[2]: (row["duty"] or {"role": "MIX"})["role"] for row in rows
    }


def give(master: Daemon, instance: Daemon, role: str) -> tuple[int, Any]:
    return master.request(
        "POST", f"/admin/instances/127.0.0.1:{instance.port}/role", {"role": role}
    )


def routes(master: Daemon, count: int) -> tuple[set[str], set[str], set[str]]:
    """Names of who prefilled and who decoded so many requests, and their texts."""
    first, second, texts = set(), set(), set()
    for _ in range(count):
        status, answer = master.request("POST", "/v1/completions", body(PROMPT))
        assert status == 200, answer
        texts.add(answer["choices"][0]["text"])
        record = master.request("GET", "/debug/requests")[1]["requests"][0]
        first.add(record["prefill_instance"].rpartition(":")[2])
        second.add(record["decode_instance"].rpartition(":")[2])
    return first, second, texts


def test_the_elected_masters_word_holds_for_all_and_outlives_it(cluster: Cluster) -> None:
    masters = cluster.daemons[1:3]
    m1, m2, m3 = cluster.daemons[3:]
    ports = [str(each.port) for each in (m1, m2, m3)]
    wait_for("an election", lambda: sum(state(each)["election"]["leads"] for each in masters) == 1)
    leader, other = sorted(masters, key=lambda each: not state(each)["election"]["leads"])
    for master in masters:
        assert state(master)["election"]["leader_http"].endswith(f":{leader.port}")
        wait_for("pairs", lambda master=master: len(state(master)["instances"]) == 3)
        wait_for("pd", lambda master=master: master.request("GET", "/ready")[1].get("mode") == "pd")
    traced = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    raw = json.dumps(body(PROMPT)).encode()
    answer = other.exchange("POST", "/v1/completions", raw, traced)
    row = other.request("GET", f"/admin/requests/{answer.body['id']}")[1]
    assert row["trace"] == answer.headers["traceparent"]
    assert row["moments"]["first_token"] > 0
    _, _, texts = routes(leader, 3)
    assert len(texts) == 1

    status, answer = give(other, m1, "PREFILL")
    assert (status, answer["error"]["code"]) == (503, "not_leader")
    assert str(leader.port) in answer["error"]["message"]
    assert give(leader, m1, "nothing")[0] == 400
    assert give(leader, m1, "PREFILL")[0] == 202
    assert give(leader, m2, "PREFILL")[0] == 202
    status, answer = give(leader, m3, "PREFILL")
    assert (status, answer["error"]["code"]) == (409, "role_needed")
    wanted = dict(zip(ports, ("PREFILL", "PREFILL", "DECODE"), strict=True))
    assert give(leader, m3, "DECODE")[0] == 202
    for master in masters:
        wait_for("the duties", lambda master=master: duties(master) == wanted)
        first, second, same = routes(master, 6)
        assert (first, second, same) == (set(ports[:2]), {ports[2]}, texts)

    leader.kill()
    wait_for("another one", lambda: state(other)["election"]["leads"])
    assert state(other)["election"]["term"] == 2
    assert duties(other) == wanted
    assert give(other, m1, "MIX")[0] == 202
    wanted[ports[0]] = "MIX"
    wait_for("the duties", lambda: duties(other) == wanted)

    m3.kill()  # m1 does both, so nothing has to move; but the answers do not stop
    wait_for(
        "the loss",
        lambda: len([1 for each in state(other)["instances"] if each["state"] == "READY"]) == 2,
    )
    first, second, same = routes(other, 4)
    assert same == texts
    assert ports[2] not in first | second
