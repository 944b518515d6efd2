"""Rows N-1 to N-9, N-11 and N-12 of the fault matrix between whole daemons: whatever befalls the link that KV takes, the text is the one it would have been.

D announces an address at which proxies listen: the one of its KV port spoils what passes, the others only pass it on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import body, newest, serves_in_pairs
from tests.ports import free_port
from tests.transport.fault_proxy import PASS, Fault, FaultProxy

ADDRESS = "127.0.0.9"  # what D announces; nobody but the proxies listens there
TOKENS = 200  # of a prompt: about 150 KiB of KV
KV_BYTES = 100_000  # less than one prompt moves
BLOCK = 16

ENDING = [
    *[Fault(kind, at) for kind in ("reset", "fin", "flip", "dup", "drop") for at in (30, 5_000)],
    *[Fault(kind, 1) for kind in ("dup frame", "drop frame", "swap frames", "replay")],
    Fault("stall", 20_000),
    Fault("flip", 100, back=True),
    Fault("reset", 160, back=True),
]


@dataclass
class Site:
    """A P, and a D behind proxies."""

    cluster: Cluster
    proxy: FaultProxy  # to the KV port
    calls: FaultProxy  # to the control port

    @property
    def master(self) -> Daemon:
        return self.cluster.daemons[0]

    def text(self, prompt: list[int], max_tokens: int = 12) -> str:
        asked = body(prompt, max_tokens=max_tokens)
        status, answer = self.master.request("POST", "/v1/completions", asked)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def attempts(self) -> int:
        """Of the newest request."""
        rows = self.master.request("GET", "/debug/requests")[1]["requests"]
        return int(rows[0]["attempt"])

    def spoil(self, plan: list[Fault]) -> int:
        """These faults befall the next connections; those that are open end. Returns how many there were so far."""
        seen = self.proxy.num_connections
        self.proxy.plan = lambda n: plan[n - seen] if n - seen < len(plan) else PASS
        self.proxy.cut()
        return seen

    def settles(self) -> None:
        """Nothing is left anywhere, and the pair serves, perhaps not at once: what was lost last may be noticed after it is mended."""
        for daemon in self.cluster.daemons[1:]:
            wait_for(f"{daemon.name} to be idle", daemon.idle)
        wait_for(
            "the pair to serve", lambda: self.text([7, 9]) and newest(self.master)["mode"] == "pd"
        )


@contextmanager
def behind_proxies(folder: Path, model: Path, mode: str) -> Iterator[Site]:
    """PUSH: D is called at its proxy; PULL: P is."""
    port, kv_port, control_port = free_port(), free_port(), free_port()
    hidden = (
        f"--port={port}",
        f"--transfer_listen_port={kv_port}",
        f"--disagg_pd_port={control_port}",
        "--host=127.0.0.1",
        f"--advertise_host={ADDRESS}",
    )
    common = (f"--block_size={BLOCK}", f"--kv_cache_transfer_mode={mode}", "--kv_streams=1")
    with ExitStack() as stack:
        passing = [
            FaultProxy(f"127.0.0.1:{each}", lambda _: PASS, listen=(ADDRESS, each))
            for each in (port, control_port)
        ]
        for each in passing:
            stack.callback(each.close)
        proxy = FaultProxy(
            f"127.0.0.1:{kv_port}",
            lambda _: PASS,
            called=mode == "PULL",
            listen=(ADDRESS, kv_port),
        )
        stack.callback(proxy.close)
        cluster = stack.enter_context(running(folder, model))
        cluster.start_master("--suspect_after_ms=1500", "--gone_after_ms=3000")
        for name, role in (("prefill", "PREFILL"), ("decode", "DECODE")):
            called = (role == "DECODE") == (mode == "PUSH")
            daemon = cluster.start_instance(name, role, *common, *(hidden if called else ()))
            daemon.port = port if called else daemon.port
        cluster.wait_ready()
        yield Site(cluster, proxy, passing[1])


@pytest.fixture(scope="module", params=["PUSH", "PULL"])
def site(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(f"bad_links_{request.param}")
    with behind_proxies(folder, tiny_model, request.param) as made:
        serves_in_pairs(made.master)
        yield made


def prompt(seed: int) -> list[int]:
    """One that nobody has seen: what D has cached is not handed over."""
    return random.Random(seed).choices(range(300), k=TOKENS)


def expected(site: Site, seed: int) -> str:
    """The text of this prompt over a good link, asked for afterwards."""
    site.proxy.plan = lambda _: PASS
    site.settles()
    return site.text(prompt(seed))


@pytest.mark.parametrize("fault", ENDING, ids=lambda each: f"{each.kind} at {each.at}")
def test_a_fault_that_ends_the_link_changes_no_text(site: Site, fault: Fault) -> None:
    """N-1 to N-7: the frames go again over another connection, or the request to another attempt."""
    seed = ENDING.index(fault) + 1
    before = site.spoil([fault])
    found = site.text(prompt(seed))
    assert site.proxy.num_connections >= before + 2  # it struck
    assert found == expected(site, seed)


def test_a_way_that_spoils_one_connection_after_the_other_costs_attempts_and_no_text(
    site: Site,
) -> None:
    seed = 101
    before = site.spoil([Fault("flip", at) for at in (900, 5_000, 20_000, 50_000, 70_000, 90_000)])
    found = site.text(prompt(seed))
    assert site.proxy.num_connections >= before + 4
    assert site.attempts() <= 3
    assert found == expected(site, seed)


@pytest.mark.parametrize("fault", [Fault(rate=400_000.0), Fault(delay_s=0.15)], ids=["slow", "far"])
def test_a_slow_or_distant_link_is_only_that(site: Site, fault: Fault) -> None:
    """N-8, N-9."""
    seed = 111 + int(fault.delay_s > 0)
    site.spoil([fault] * 100)
    found = site.text(prompt(seed))
    site.spoil([])
    assert found == expected(site, seed)


def test_a_link_that_comes_and_goes_starves_nobody(site: Site) -> None:
    """N-12, for some seconds, with no other pair: for one second of two connections are cut, and new ones as well."""
    over = threading.Event()

    def flap() -> None:
        while not over.is_set():
            site.proxy.plan = lambda _: Fault("reset", 0)
            site.proxy.cut()
            over.wait(1.0)
            site.proxy.plan = lambda _: PASS
            over.wait(1.0)

    flapping = threading.Thread(target=flap)
    flapping.start()
    seeds = range(121, 133)
    pending = []
    try:
        for seed in seeds:
            pending.append(Pending(site.master, body(prompt(seed), max_tokens=12)))
            over.wait(0.4)
        found = [each.answer() for each in pending]
    finally:
        over.set()
        flapping.join()
    for seed, answer in zip(seeds, found, strict=True):
        assert answer.status == 200, answer.body
        assert answer.body["choices"][0]["text"] == expected(site, seed)


def test_nobody_gets_a_call_through_to_one_that_itself_reaches_everybody(site: Site) -> None:
    """N-11, one direction: of the pair only the other one is called, or nobody is while it lasts; nothing is lost."""
    seeds = range(161, 164)
    site.calls.plan = lambda _: Fault("reset", 0)
    site.calls.cut()
    pending = [Pending(site.master, body(prompt(seed), max_tokens=12)) for seed in seeds]
    time.sleep(1.0)
    site.calls.plan = lambda _: PASS
    found = [each.answer() for each in pending]
    for seed, answer in zip(seeds, found, strict=True):
        assert answer.status == 200, answer.body
        assert answer.body["choices"][0]["text"] == expected(site, seed)


def test_two_that_cannot_reach_each_other_leave_it_to_another_pair(
    site: Site, tmp_path: Path
) -> None:
    """N-11, P to D only: their pair leaves routing, neither instance does, and it comes back by itself."""
    mode = next(flag for flag in site.cluster.daemons[1].command if "transfer_mode" in flag)
    role = "DECODE" if mode.endswith("PUSH") else "PREFILL"
    other = site.cluster.start_instance("other", role, f"--block_size={BLOCK}", mode)
    site.cluster.wait_ready(other)
    site.proxy.plan = lambda _: Fault("reset", 0)
    site.proxy.cut()
    for seed in range(141, 147):
        assert site.text(prompt(seed))

    def states() -> list[str]:
        rows = site.master.request("GET", "/admin/instances")[1]["instances"]
        return sorted(row["state"] for row in rows)

    assert states() == ["READY"] * 3
    found = {seed: site.text(prompt(seed)) for seed in range(151, 154)}
    for seed, text in found.items():
        assert text == expected(site, seed)
    site.cluster.daemons.remove(other)
    other.stop()
