"""One instance over several ranks, on one node and on two: the text of one rank, handoffs between unlike numbers, and the end of all with any."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import LONG_PROMPT, body, serves_in_pairs
from tests.families import CASES, make_family
from tests.ports import free_port

PROMPTS = [[(7 * n + 13 * turn) % 300 for n in range(1 + 2 * turn)] for turn in range(64)]
FLAGS = ("--dtype=float32", "--block_size=16")


def devices(count: int) -> str:
    return "--devices=" + ",".join(f"cpu:{n}" for n in range(count))


def texts(daemon: Daemon, prompts: list[list[int]]) -> list[str]:
    """All prompts in one request, greedy."""
    status, answer = daemon.request("POST", "/v1/completions", body(prompts[0]))
    assert status == 200, answer
    found = []
    for prompt in prompts:
        status, answer = daemon.request("POST", "/v1/completions", body(prompt))
        assert status == 200, answer
        found.append(answer["choices"][0]["text"])
    return found


def nodes(
    cluster: Cluster,
    name: str,
    count: int,
    per_node: int,
    *flags: str,
    role: str = "DEFAULT",
    host: str = "127.0.0.1",
    elsewhere: tuple[str, ...] = (),
) -> list[Daemon]:
    """The nodes of one instance, node 0 first. host: of node 0. elsewhere: what brings the others to where they run."""
    address = f"--master_node_addr={host}:{free_port()}"
    return [
        cluster.start_instance(
            f"{name} node {node}",
            role,
            *(("--etcd_addr=",) if role == "DEFAULT" else ()),
            devices(per_node),
            f"--nnodes={count}",
            f"--node_rank={node}",
            address,
            *FLAGS,
            *flags,
            under=elsewhere if node else (),
        )
        for node in range(count)
    ]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What one rank answers."""
    with running(tmp_path_factory.mktemp("alone"), tiny_model) as cluster:
        one = cluster.start_instance("one", "DEFAULT", devices(1), *FLAGS)
        cluster.wait_ready()
        yield texts(one, PROMPTS)


@pytest.mark.parametrize(("count", "per_node"), [(1, 4), (2, 1)])
def test_any_number_of_ranks_gives_the_text_of_one(
    tiny_model: Path, tmp_path: Path, alone: list[str], count: int, per_node: int
) -> None:
    with running(tmp_path, tiny_model) as cluster:
        first, *others = nodes(cluster, "i", count, per_node)
        cluster.wait_ready(first)
        assert "kernels depend on chunking" not in first.log()
        some = slice(None, None, per_node)  # four ranks on two cores are slow
        assert texts(first, PROMPTS[some]) == alone[some]
        for other in others:
            assert not other.listens(), "only node 0 has a door"
        engines = [each for daemon in cluster.daemons for each in daemon.processes()]
        assert first.stop() == 0
        for other in others:
            assert other.process.wait(10) == 7
        wait_for("no process left", lambda: not psutil.wait_procs(engines, timeout=0)[1])


class Namespace:
    """A host of its own, as far as the network goes, at the other end of a cable to this one."""

    def __init__(self) -> None:
        name = f"xllm{os.getpid()}"
        self._cable, self.host = name[:11] + "a", "10.211.7.1"
        self.inside = ("ip", "netns", "exec", name)
        self._name, self._theirs = name, name[:11] + "b"

    def __enter__(self) -> Namespace:
        self._ip("netns", "add", self._name)
        self._ip(
            "link", "add", self._cable, "type", "veth", "peer", self._theirs, "netns", self._name
        )
        self._ip("addr", "add", f"{self.host}/30", "dev", self._cable)
        self._ip("link", "set", self._cable, "up")
        there = ("-n", self._name)
        self._ip(*there, "addr", "add", "10.211.7.2/30", "dev", self._theirs)
        self._ip(*there, "link", "set", self._theirs, "up")
        self._ip(*there, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._ip("netns", "del", self._name)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=10)


def namespaces_work() -> bool:
    """Root may make them, where the kernel and the sandbox around us let it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"xllm-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made.returncode == 0


@pytest.mark.skipif(not namespaces_work(), reason="network namespaces cannot be made here")
def test_nodes_on_two_hosts_give_the_text_of_one(
    tiny_model: Path, tmp_path: Path, alone: list[str]
) -> None:
    with Namespace() as other_host, running(tmp_path, tiny_model) as cluster:
        first, second = nodes(cluster, "i", 2, 2, host=other_host.host, elsewhere=other_host.inside)
        cluster.wait_ready(first)
        assert texts(first, PROMPTS[::8]) == alone[::8]
        assert first.stop() == 0
        assert second.process.wait(10) == 7


def test_whole_experts_on_each_of_two_ranks_hand_over(tiny_model: Path, tmp_path: Path) -> None:
    model = make_family(tmp_path / "moe" / "tiny", CASES["qwen3_moe"] | {"vocab_size": 320})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, model)
    prompts = PROMPTS[::16]
    with running(tmp_path, model) as cluster:
        one = cluster.start_instance("one", "DEFAULT", devices(1), *FLAGS)
        cluster.wait_ready()
        wanted = texts(one, prompts)
        assert one.stop() == 0
        cluster.daemons.clear()
        master = cluster.start_master()
        cluster.start_instance("p", "PREFILL", devices(2), "--ep_size=2", *FLAGS)
        decode = cluster.start_instance("d", "DECODE", devices(2), *FLAGS)
        cluster.wait_ready()
        serves_in_pairs(master)
        assert texts(master, prompts) == wanted
        assert decode.ledger()["kv_bytes_received"] > 0


@pytest.mark.parametrize(
    ("on_p", "on_d", "mode"), [(2, 1, "PUSH"), (2, 4, "PUSH"), (1, 2, "PULL"), (2, 2, "PULL")]
)
def test_instances_of_unlike_numbers_of_ranks_hand_over_to_each_other(
    tiny_model: Path, tmp_path: Path, alone: list[str], on_p: int, on_d: int, mode: str
) -> None:
    flags = (*FLAGS, f"--kv_cache_transfer_mode={mode}", "--kv_streams=2")
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        cluster.start_instance("p", "PREFILL", devices(on_p), *flags)
        decode = cluster.start_instance("d", "DECODE", devices(on_d), *flags)
        cluster.wait_ready()
        serves_in_pairs(master)
        some = range(0, len(PROMPTS), 9)
        assert texts(master, [PROMPTS[n] for n in some]) == [alone[n] for n in some]
        rows = master.request("GET", "/debug/requests")[1]["requests"][: len(some)]
        assert {row["mode"] for row in rows} == {"pd"}
        assert decode.ledger()["kv_bytes_received"] > 0
        wait_for("nothing left", lambda: all(each.idle() for each in cluster.daemons[1:]))


def test_an_instance_over_two_nodes_hands_over_from_rank_to_rank(
    tiny_model: Path, tmp_path: Path, alone: list[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("a key of the cluster, thirty-two bytes and more")
    key.chmod(0o600)
    shared = f"--cluster_key_file={key}"
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master(shared)
        nodes(cluster, "p", 2, 1, shared, role="PREFILL")
        nodes(cluster, "d", 2, 1, shared, role="DECODE")
        doors = [each for each in cluster.daemons if "node 1" not in each.name]
        cluster.wait_ready(*doors)
        serves_in_pairs(master)
        some = range(0, len(PROMPTS), 9)
        assert texts(master, [PROMPTS[n] for n in some]) == [alone[n] for n in some]
        wait_for("nothing left", lambda: all(each.idle() for each in doors[1:]))


# ---- the end of all with any


def ranks_of(daemon: Daemon) -> list[psutil.Process]:
    """Rank 0's engine, and those that it started."""
    (engine,) = [each for each in daemon.processes() if "xllm_py.engine" in each.cmdline()]
    return [engine, *engine.children()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_its_instance_and_its_requests_go_on_elsewhere(
    tiny_model: Path, tmp_path: Path, rank: int
) -> None:
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        two = cluster.start_instance(
            "two", "DEFAULT", devices(2), *FLAGS, f"--etcd_addr=127.0.0.1:{cluster.etcd_port}"
        )
        cluster.wait_ready()
        wait_for("it to serve", master.is_ready)
        fields: dict[str, Any] = {"max_tokens": 400}
        wanted = master.request("POST", "/v1/completions", body(LONG_PROMPT[:50], **fields))[1]
        other = cluster.start_instance(
            "other", "DEFAULT", devices(2), *FLAGS, f"--etcd_addr=127.0.0.1:{cluster.etcd_port}"
        )
        cluster.wait_ready(other)
        every = [*two.processes(), *ranks_of(two)]
        pending = [Pending(master, body(LONG_PROMPT[:50], **fields)) for _ in range(4)]
        wait_for("work at both", lambda: two.ledger()["requests_open"] > 0)
        os.kill(ranks_of(two)[rank].pid, signal.SIGKILL)
        assert two.process.wait(10) == 7
        wait_for("no orphan", lambda: not psutil.wait_procs(every, timeout=0)[1])

        def gone() -> bool:
            rows = master.request("GET", "/admin/instances")[1]["instances"]
            return all(
                row["state"] != "READY" for row in rows if row["name"].endswith(str(two.port))
            )

        wait_for("the master to know", gone)
        for each in pending:
            answer = each.answer()
            assert answer.status == 200, answer.body
            assert answer.body["choices"] == wanted["choices"]
        if rank:
            assert "rank 1 (cpu:1 of node 0) ended with exit code -9" in two.log()


def test_a_killed_node_ends_the_others(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        first, second = nodes(cluster, "i", 2, 1)
        cluster.wait_ready(first)
        second.kill()
        assert first.process.wait(10) == 7
        assert "rank 1 (cpu:0 of node 1) is gone" in first.log()
        cluster.daemons.clear()


# ---- starts that fail


def ends(daemon: Daemon, timeout_s: float = 60.0) -> tuple[int, str]:
    """Exit code and last line."""
    code = daemon.process.wait(timeout_s)
    return code, daemon.log().strip().splitlines()[-1]


def test_nodes_that_do_not_fit_say_what_differs_on_both(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        address = f"--master_node_addr=127.0.0.1:{free_port()}"
        common = ("--etcd_addr=", "--nnodes=2", address)
        made = [
            cluster.start_instance(
                f"node {node}", "DEFAULT", *common, f"--node_rank={node}", f"--block_size={size}"
            )
            for node, size in ((0, 16), (1, 32))
        ]
        for daemon in made:
            code, line = ends(daemon)
            assert code == 2, line
            assert "--block_size differs: 16 on rank 0, 32 on rank 1 (node 1)" in line
        cluster.daemons.clear()


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_waits_in_vain_says_for_whom(
    tiny_model: Path, tmp_path: Path, node: int
) -> None:
    with running(tmp_path, tiny_model) as cluster:
        address = f"127.0.0.1:{free_port()}"
        daemon = cluster.start_instance(
            "lonely",
            "DEFAULT",
            "--etcd_addr=",
            "--nnodes=2",
            f"--node_rank={node}",
            f"--master_node_addr={address}",
            "--max_reconnect_count=1",
        )
        code, line = ends(daemon)
        assert code == 4, line
        assert address in line
        assert "rank 1 of 2" in line
        cluster.daemons.clear()


def test_a_model_that_cannot_be_shared_out_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        daemon = cluster.start_instance("three", "DEFAULT", "--etcd_addr=", devices(3))
        code, line = ends(daemon)
        assert code == 2, line
        assert "3 ranks cannot share out the model's 4 attention heads" in line
        cluster.daemons.clear()
