"""Instances on a simulated npu: between themselves to the bit, and with a cpu instance as the other half."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.phases import body, serves_in_pairs

NPU = {"XLLM_SIMULATE_NPU": "2"}
PROMPTS = [[(5 * n + turn) % 300 for n in range(150 + turn)] for turn in range(3)]


def answers(daemon: Daemon) -> list[str]:
    """Greedy and seeded."""
    found = []
    for turn, prompt in enumerate(PROMPTS):
        fields = {"temperature": 0.8, "seed": 5} if turn else {}
        status, answer = daemon.request("POST", "/v1/completions", body(prompt, **fields))
        assert status == 200, answer
        found.append(answer["choices"][0]["text"])
    return found


def states(master: Daemon) -> set[tuple[str, str]]:
    """Of all pairs: state and reason."""
    rows = master.request("GET", "/admin/instances")[1]["instances"]
    return {(link["state"], link["reason"]) for row in rows for link in row["links"]}


def test_two_npus_give_the_text_of_one(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        cluster.start_instance("p", "PREFILL", "--devices=npu:0", env=NPU)
        decode = cluster.start_instance("d", "DECODE", "--devices=npu:1", env=NPU)
        cluster.wait_ready()
        serves_in_pairs(master)
        assert states(master) == {("linked", "")}, "and they know that they are exact"
        split = answers(master)
        rows = master.request("GET", "/admin/instances")[1]["instances"]
        assert {row["card"]["device_type"] for row in rows} == {"npu"}
        assert decode.ledger()["kv_bytes_received"] > 0
        alone = cluster.start_instance(
            "alone", "DEFAULT", "--etcd_addr=", "--devices=npu:1", env=NPU
        )
        cluster.wait_ready(alone)
        assert answers(alone) == split


def test_the_caches_of_several_npus_go_to_who_has_their_heads(
    tiny_model: Path, tmp_path: Path
) -> None:
    """And each rank copies its own between device and host."""
    env = {"XLLM_SIMULATE_NPU": "3"}
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        flags = ("--dtype=float32", "--block_size=128")
        cluster.start_instance("p", "PREFILL", "--devices=npu:0,npu:1", *flags, env=env)
        decode = cluster.start_instance("d", "DECODE", "--devices=npu:2", *flags, env=env)
        cluster.wait_ready()
        serves_in_pairs(master)
        split = answers(master)
        assert decode.ledger()["kv_bytes_received"] > 0
        wait_for("nothing left", lambda: all(each.idle() for each in cluster.daemons[1:]))
        alone = cluster.start_instance(
            "alone", "DEFAULT", "--etcd_addr=", "--devices=npu:2", *flags, env=env
        )
        cluster.wait_ready(alone)
        assert answers(alone) == split


@pytest.mark.parametrize("first", ["npu", "cpu"])
def test_unlike_devices_hand_over_to_each_other_and_say_that_bits_may_differ(
    tiny_model: Path, tmp_path: Path, first: str
) -> None:
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        for name, role, kind in (
            ("p", "PREFILL", first),
            ("d", "DECODE", "cpu" if first == "npu" else "npu"),
        ):
            cluster.start_instance(name, role, f"--devices={kind}:0", env=NPU)
        cluster.wait_ready()
        serves_in_pairs(master)
        ((state, reason),) = states(master)
        assert state == "linked"
        assert "numerics fingerprints differ" in reason
        assert len(answers(master)) == len(PROMPTS)
        wait_for("nothing left", lambda: all(each.idle() for each in cluster.daemons[1:]))
