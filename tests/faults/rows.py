"""The rows of the fault matrix that real processes can be made to suffer, each as a function that injects and one that mends.

Letters and numbers are those of the matrix: P and D for instances, G for gray failures, M for masters, E for the registry, C for clients.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING

import psutil

from tests.e2e.cluster import Daemon

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign

Mend = Callable[[], None]
Fault = Callable[["Campaign", Random], Mend]


def _kill(random: Random, daemons: list[Daemon], apart_s: float = 0.0) -> None:
    """SIGKILL to the API process of each, to its engine, or to both; the instance dies as one and leaves nothing."""
    every = [daemon.processes() for daemon in daemons]
    for processes in every:
        for process in random.choice((processes[:1], processes[1:] or processes, processes)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(apart_s * random.random())
    for daemon, processes in zip(daemons, every, strict=True):
        _, alive = psutil.wait_procs(processes[1:], timeout=10)
        daemon.process.wait(10)
        assert not alive, f"{daemon.name} left {alive}"


def _killed(
    campaign: Campaign, random: Random, names: tuple[str, ...], apart_s: float = 0.0
) -> Mend:
    daemons = [campaign.instances[name] for name in names]
    _kill(random, daemons, apart_s)

    def mend() -> None:
        for daemon in daemons:
            daemon.start()

    return mend


def kill_p(campaign: Campaign, random: Random) -> Mend:
    """P-1 to P-6: whatever it is doing."""
    return _killed(campaign, random, (random.choice(campaign.prefills),))


def kill_d(campaign: Campaign, random: Random) -> Mend:
    """D-1 to D-4."""
    return _killed(campaign, random, (random.choice(campaign.decodes),))


def kill_both_d(campaign: Campaign, random: Random) -> Mend:
    """D-5: within 100 ms, and back at once."""
    _killed(campaign, random, campaign.decodes, 0.1)()
    return _nothing


def kill_both_p(campaign: Campaign, random: Random) -> Mend:
    """D-6, and back at once."""
    _killed(campaign, random, campaign.prefills, 0.1)()
    return _nothing


def kill_pair(campaign: Campaign, random: Random) -> Mend:
    """A P and a D within 50 ms."""
    pair = random.choice(campaign.prefills), random.choice(campaign.decodes)
    return _killed(campaign, random, pair, 0.05)


def _nothing() -> None:
    """There is nothing to mend."""


def _frozen(daemon: Daemon, random: Random, seconds: tuple[float, ...], who: str) -> Mend:
    processes = daemon.processes()
    chosen = {"both": processes, "api": processes[:1], "engine": processes[1:]}[who]
    for process in chosen:
        process.suspend()
    time.sleep(random.choice(seconds))
    for process in chosen:
        process.resume()
    return _nothing


def stop_d(campaign: Campaign, random: Random) -> Mend:
    """G-1."""
    daemon = campaign.instances[random.choice(campaign.decodes)]
    return _frozen(daemon, random, (0.2, 1.0, 3.0), random.choice(("both", "api")))


def stop_p(campaign: Campaign, random: Random) -> Mend:
    """G-2."""
    daemon = campaign.instances[random.choice(campaign.prefills)]
    return _frozen(daemon, random, (0.2, 1.0, 3.0), random.choice(("both", "api")))


def stop_engine(campaign: Campaign, random: Random) -> Mend:
    """G-4: heartbeats go on."""
    daemon = campaign.instances[random.choice((*campaign.prefills, *campaign.decodes))]
    return _frozen(daemon, random, (1.0, 4.0), "engine")


def stop_master(campaign: Campaign, random: Random) -> Mend:
    """G-3, as far as one master goes: nobody is judged for its sleep."""
    return _frozen(random.choice(campaign.masters), random, (0.3, 1.5), "both")


def kill_master(campaign: Campaign, random: Random) -> Mend:
    """M-1: its clients go on at the other one."""
    victim = random.choice(campaign.masters)
    victim.process.kill()
    victim.process.wait()

    def mend() -> None:
        victim.start()
        campaign.cluster.wait_ready(victim)

    return mend


def drain(campaign: Campaign, random: Random) -> Mend:
    """M-4: SIGTERM to an instance; it must end with 0."""
    daemon = campaign.instances[random.choice((*campaign.prefills, *campaign.decodes))]
    daemon.process.send_signal(signal.SIGTERM)
    return _left(daemon)


def drain_by_hand(campaign: Campaign, random: Random) -> Mend:
    """M-4 by POST /admin/instances/{name}/drain: to move what runs, or to finish it."""
    daemon = campaign.instances[random.choice((*campaign.prefills, *campaign.decodes))]
    path = f"/admin/instances/127.0.0.1:{daemon.port}/drain"
    status, told = campaign.master.request(
        "POST", path, {"mode": random.choice(("move", "finish"))}
    )
    assert status == 202, told
    return _left(daemon)


def rolling_restart(campaign: Campaign, random: Random) -> Mend:
    """M-4: every daemon in turn, SIGTERM and started again, and new requests all the while at the masters that are ready."""
    every = [*campaign.instances.values(), *campaign.masters]
    random.shuffle(every)
    for daemon in every:
        ready = [master for master in campaign.masters if master is not daemon]
        campaign.ask_more(3, ready)
        daemon.process.send_signal(signal.SIGTERM)
        campaign.ask_more(3, ready)
        assert daemon.process.wait(40) == 0, daemon.tail()
        campaign.ask_more(3, ready)
        daemon.start()
        campaign.wait_whole()
    return _nothing


def _left(daemon: Daemon) -> Mend:
    """It must end in order."""

    def mend() -> None:
        assert daemon.process.wait(40) == 0, daemon.tail()
        daemon.start()

    return mend


def etcd_away(campaign: Campaign, random: Random) -> Mend:
    """E-1: killed, and back with its data."""
    campaign.registry.kill()
    time.sleep(random.choice((0.5, 2.0, 5.0)))
    campaign.registry.start()
    return _nothing


def etcd_away_for_long(campaign: Campaign, random: Random) -> Mend:
    """E-1: for five minutes, and new requests all the while."""
    campaign.registry.kill()
    until = time.monotonic() + 300
    while time.monotonic() < until:
        campaign.ask_more(2, campaign.masters, within_s=2.0)
    campaign.registry.start()
    return _nothing


def etcd_away_and_kill_d(campaign: Campaign, random: Random) -> Mend:
    """E-2."""
    campaign.registry.kill()
    mend = kill_d(campaign, random)
    time.sleep(1.0)
    campaign.registry.start()
    return mend


def etcd_empty(campaign: Campaign, random: Random) -> Mend:
    """E-4."""
    campaign.registry.kill()
    campaign.registry.wipe()
    time.sleep(random.choice((0.1, 1.0)))
    campaign.registry.start()
    return _nothing


def etcd_stopped(campaign: Campaign, random: Random) -> Mend:
    """E-6."""
    campaign.registry.freeze()
    time.sleep(random.choice((0.5, 3.0)))
    campaign.registry.thaw()
    return _nothing


def lease_revoked(campaign: Campaign, random: Random) -> Mend:
    """E-3: of whoever it is."""
    leases = campaign.registry.ctl("lease", "list").split()
    chosen = [word for word in leases if len(word) == 16]
    if chosen:
        campaign.registry.ctl("lease", "revoke", random.choice(chosen), may_fail=True)
    return _nothing


def compaction(campaign: Campaign, random: Random) -> Mend:
    """E-5: at head while the master, who watches, stands still."""
    process = psutil.Process(random.choice(campaign.masters).process.pid)
    process.suspend()
    try:
        campaign.registry.ctl("put", "/other", str(random.random()))
        said = campaign.registry.ctl("get", "/other", "-w", "fields")
        revision = next(line.split()[-1] for line in said.splitlines() if '"Revision"' in line)
        campaign.registry.ctl("compact", revision, may_fail=True)
    finally:
        process.resume()
    return _nothing


def clients_leave(campaign: Campaign, random: Random) -> Mend:
    """C-1 and C-2: half of them, at moments of their own."""
    for client in random.sample(campaign.clients, len(campaign.clients) // 2):
        time.sleep(0.05 * random.random())
        if not client.over:
            client.leave()
    return _nothing


ROWS: dict[str, Fault] = {
    "P-1..6 kill P": kill_p,
    "D-1..4 kill D": kill_d,
    "D-5 kill both D": kill_both_d,
    "D-6 kill both P": kill_both_p,
    "P+D kill a pair": kill_pair,
    "G-1 stop D": stop_d,
    "G-2 stop P": stop_p,
    "G-3 stop the master": stop_master,
    "G-4 stop an engine": stop_engine,
    "M-1 kill a master": kill_master,
    "M-4 drain an instance": drain,
    "M-4 drain by hand": drain_by_hand,
    "E-1 etcd away": etcd_away,
    "E-2 etcd away, kill D": etcd_away_and_kill_d,
    "E-3 lease revoked": lease_revoked,
    "E-4 etcd empty": etcd_empty,
    "E-5 compaction": compaction,
    "E-6 stop etcd": etcd_stopped,
    "C-1,2 clients leave": clients_leave,
}

# takes too long for the gate
BY_HAND: dict[str, Fault] = {
    "M-4 rolling restart": rolling_restart,
    "E-1 etcd away for five minutes": etcd_away_for_long,
}


def in_turn(names: tuple[str, ...], random: Random) -> Iterator[str]:
    """Every row before any comes again; deaths twice as often."""
    while True:
        bag = [*names, *(name for name in names if "kill" in name)]
        random.shuffle(bag)
        yield from bag
