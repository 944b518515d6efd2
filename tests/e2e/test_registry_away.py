"""The registry dies under a serving cluster: nobody notices; it comes back empty: all who live are in it again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import body, serves_in_pairs
from xllm_py.base.clock import RealClock
from xllm_py.cluster import keys
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import open_registry

LEASE_S = 2


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A registry of its own, master, P, D."""
    with running(tmp_path_factory.mktemp("registry"), tiny_model) as made:
        made.start_registry()
        made.start_master()
        for name, role in (("prefill", "PREFILL"), ("decode", "DECODE")):
            made.start_instance(name, role, "--block_size=16", f"--etcd_ttl={LEASE_S}")
        made.wait_ready(*made.daemons[1:])
        serves_in_pairs(made.daemons[1])
        yield made


def registry_is_up(master: Daemon) -> bool:
    """As the master's metric says."""
    text = str(master.request("GET", "/metrics")[1])
    (line,) = [line for line in text.splitlines() if line.startswith("xllm_etcd_up ")]
    return float(line.split()[1]) == 1


async def found_keys(cluster: Cluster) -> set[str]:
    """Every key that stands in the registry."""
    config = EtcdSlice(address=f"127.0.0.1:{cluster.etcd_port}")
    registry = await open_registry(config, RealClock())
    try:
        return {entry.key for entry in (await registry.entries(keys.EVERYTHING))[0]}
    finally:
        await registry.close()


async def test_a_registry_that_dies_and_comes_back_empty_fails_no_request(cluster: Cluster) -> None:
    registry, master, _, decode = cluster.daemons
    before = await found_keys(cluster)
    # two cards, the master's record, who is elected and since when, the cluster's key
    assert len(before) == 6
    streams = [Pending(master, body([7, 9, n], max_tokens=1500, stream=True)) for n in range(4)]
    for stream in streams:
        stream.wait_pieces(2)
    registry.kill()
    wait_for("the master to miss it", lambda: not registry_is_up(master))

    def one(number: int) -> int:
        status, _ = master.request("POST", "/v1/completions", body([5, number], max_tokens=50))
        assert master.request("GET", "/ready")[0] == 200
        return status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, range(40))) == {200}
    for stream in streams:
        assert stream.answer().status == 200
        assert stream.pieces[-1] == "[DONE]"
    registry.start()
    wait_for("the registry", registry.listens)
    wait_for("the master to find it", lambda: registry_is_up(master))
    deadline = RealClock().now() + 20
    while (after := await found_keys(cluster)) != before:
        assert RealClock().now() < deadline, (before, after)
    wait_for("the pair", lambda: master.request("GET", "/ready")[1].get("mode") == "pd")
    decode.kill()  # its next life knows the cluster from this registry alone
    decode.start()
    wait_for("the old life to go", lambda: "instance gone" in master.log())
    serves_in_pairs(master)
