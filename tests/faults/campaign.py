"""Real processes, real faults: trials drawn by a seed, each with clients whose answers are known beforehand.

    python -m tests.faults.campaign [--trials 60] [--seed 0] [--row "D-1..4 kill D"] [--report FILE]

One etcd, two masters, 2 P and 2 D with a small random model; clients with Idempotency-Keys at either master. Each trial begins some clients, lets something befall the cluster, and then
looks: every answer is there once, equal to the answer without faults; every block, grant and request is let go of; nobody died but whom we
killed. At the end one JSON line with stalls of those affected and the gaps of bystanders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, Daemon, wait_for
from tests.faults.clients import TIMEOUT_S, Client, Seen, requests
from tests.faults.rows import BY_HAND, ROWS, in_turn
from tests.registry.real_etcd import RealEtcd

CLIENTS = 8
QUIET_S = 20.0  # of which most is the start of those who were killed
_GAP_S = 0.25  # more between two events is a stall, not a busy machine


class Wrong(AssertionError):
    """A property does not hold."""


class Campaign:
    """The cluster and what is known of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = Random(seed)
        self.prefills, self.decodes = ("p1", "p2"), ("d1", "d2")
        self.registry = RealEtcd(folder)
        self.registry.start()
        model = make_checkpoint(folder / "tiny", seed=7, layers=6, with_tokenizer=True)
        self.cluster = Cluster(folder, model, etcd_port=self.registry.port)
        # a busy machine keeps processes waiting for longer than the defaults bear
        patience = ("--suspect_after_ms=700", "--gone_after_ms=1200")
        self.masters = [self.cluster.start_master(*patience) for _ in range(2)]
        self.master = self.masters[0]
        flags = ("--block_size=16", "--drain_timeout_s=20")
        # one of them begins steps ahead of what it has taken in
        more = {"d2": ("--enable_schedule_overlap",)}
        self.instances = {
            name: self.cluster.start_instance(name, role, *flags, *more.get(name, ()))
            for names, role in ((self.prefills, "PREFILL"), (self.decodes, "DECODE"))
            for name in names
        }
        self.pool = requests()
        self.right: list[Seen] = []
        self.clients: list[Client] = []
        self.stalls: list[float] = []
        self.calm_gaps: list[float] = []
        self.bystander_gaps: list[float] = []
        self.attempts: Counter[int] = Counter()

    def begin(self) -> None:
        """Wait until all pairs are linked, and ask everything once without faults."""
        self.cluster.wait_ready()
        self.wait_whole()
        for number, ask in enumerate(self.pool):
            client = Client([self.master.port], number, *ask)
            if not client.join(TIMEOUT_S) or client.seen.wrong:
                raise Wrong(f"request {number} without any fault: {client.seen.wrong}")
            self.right.append(client.seen)
        self._start_clients(0.2)
        for client in self.clients:
            client.join(TIMEOUT_S)
            self.calm_gaps += client.gaps()
        self._judge()

    def wait_whole(self) -> None:
        """Every instance serves, and every pair is linked."""

        for master in self.masters:
            self._wait_whole(master)

    def _wait_whole(self, master: Daemon) -> None:
        def whole() -> bool:
            for daemon in self.instances.values():
                daemon.check_lives()
            rows = self._rows(master)
            linked = sum(
                link["state"] == "linked"
                for row in rows
                if row["state"] == "READY"
                for link in row["links"]
            )
            ready = [row for row in rows if row["state"] == "READY"]
            return len(ready) == 4 and linked == 8  # each pair in the rows of both

        wait_for("the whole cluster", whole, 60)

    def _rows(self, master: Daemon) -> list[dict[str, Any]]:
        try:
            status, body = master.request("GET", "/admin/instances")
        except OSError:
            return []
        if status != 200:
            return []
        rows: list[dict[str, Any]] = body["instances"]
        return rows

    # ---- one trial ----

    def trial(self, row: str) -> None:
        """Raises Wrong."""
        self.wait_whole()
        self._start_clients(0.3)
        time.sleep(self.random.uniform(0.0, 1.0))
        mend = {**ROWS, **BY_HAND}[row](self, self.random)
        end = time.monotonic() + TIMEOUT_S
        mended = False
        while not all(client.over for client in self.clients):
            time.sleep(0.02)
            if not mended and time.monotonic() > end - TIMEOUT_S + 3.0:
                mend()  # what waits for it goes on with it
                mended = True
            if time.monotonic() > end:
                raise Wrong(f"requests {[c.number for c in self.clients if not c.over]} hang")
        if not mended:
            mend()
        self._judge()
        self._measure()
        self._wait_quiet()

    def _start_clients(self, within_s: float) -> None:
        self.clients = []
        self.ask_more(CLIENTS, self.masters, within_s)

    def ask_more(self, count: int, masters: list[Daemon], within_s: float = 0.1) -> None:
        """New clients beside those that wait, at one of these masters each."""
        for _ in range(count):
            number = self.random.randrange(len(self.pool))
            ports = [master.port for master in masters]
            self.random.shuffle(ports)
            key = f"{id(self)} {time.monotonic()}"  # two masters make the same answer of it
            self.clients.append(Client(ports, number, *self.pool[number], key=key))
            time.sleep(self.random.uniform(0, within_s / count))

    def _judge(self) -> None:
        for client in self.clients:
            if client.left:
                continue
            if client.seen.wrong:
                raise Wrong(
                    f"request {client.number} ({client.seen.request_id}): {client.seen.wrong}"
                )
            if client.seen != self.right[client.number]:
                raise Wrong(
                    f"request {client.number} ({client.seen.request_id}) differs: {client.seen} "
                    f"and not {self.right[client.number]}"
                )

    def _measure(self) -> None:
        for client in self.clients:
            if client.left or not client.seen.request_id:
                continue
            attempt = self._attempt(client)
            self.attempts[attempt] += 1
            if attempt != 1:
                self.stalls.append(client.longest_gap())
            else:
                self.bystander_gaps += client.gaps()

    def _attempt(self, client: Client) -> int:
        """The last one of its request; 0 when a master was lost in between."""
        (master,) = [each for each in self.masters if each.port == client.port]
        path = f"/debug/requests/{client.seen.request_id}"
        status, record = master.request("GET", path)
        return int(record["attempt"]) if status == 200 else 0

    def _wait_quiet(self) -> None:
        """Everything is let go of, by those who live."""

        def quiet() -> bool:
            masters = all(self._forgot(master) for master in self.masters)
            return masters and all(self._idle(daemon) for daemon in self.instances.values())

        try:
            wait_for("everything to be let go of", quiet, QUIET_S)
        except AssertionError as error:
            ledgers = {name: self._ledger(daemon) for name, daemon in self.instances.items()}
            told = [self._ledger(master) for master in self.masters]
            raise Wrong(f"{error}: masters {told}, {ledgers}") from None

    def _forgot(self, master: Daemon) -> bool:
        try:
            return not master.ledger()["open_requests"]
        except (OSError, AssertionError):
            master.check_lives()
            return False

    def _idle(self, daemon: Daemon) -> bool:
        try:
            return daemon.idle()
        except (OSError, AssertionError):
            daemon.check_lives()
            return False  # it is starting still

    def _ledger(self, daemon: Daemon) -> object:
        try:
            return daemon.ledger()
        except (OSError, AssertionError) as error:
            return str(error)[:100]

    # ---- the end ----

    def report(self) -> dict[str, Any]:
        """What it cost."""
        affected = [stall for stall in self.stalls if stall > 0]
        return {
            "attempts": dict(sorted(self.attempts.items())),
            "affected": len(affected),
            "stall_s": _percentiles(affected),
            "calm_gap_ms": _percentiles([1000 * gap for gap in self.calm_gaps]),
            "bystander_gap_ms": _percentiles([1000 * gap for gap in self.bystander_gaps]),
        }

    def close(self) -> None:
        """Stop all."""
        try:
            self.cluster.stop()
        finally:
            self.registry.thaw()
            self.registry.kill()


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(values), 3)}


@contextlib.contextmanager
def running(seed: int) -> Iterator[Campaign]:
    """A cluster that has answered everything once."""
    with tempfile.TemporaryDirectory(prefix="xllm-faults-") as folder:
        campaign = Campaign(Path(folder), seed)
        try:
            campaign.begin()
            yield campaign
        except AssertionError as error:
            logs = "\n".join(f"--- {d.name}\n{d.tail(25)}" for d in campaign.cluster.daemons)
            raise Wrong(f"{error}\n{logs}") from error
        finally:
            campaign.close()


def run(trials: int, seed: int, rows: tuple[str, ...], say: bool = False) -> dict[str, Any]:
    """So many trials. Raises Wrong with the row and the seed of the first that goes wrong."""
    told: Counter[str] = Counter()
    began = time.monotonic()
    with running(seed) as campaign:
        turns = in_turn(rows, campaign.random)
        for number in range(trials):
            row = next(turns)
            at = time.monotonic()
            try:
                campaign.trial(row)
            except AssertionError as error:
                raise Wrong(f"trial {number} of seed {seed}, {row}: {error}") from error
            told[row] += 1
            if say:
                print(
                    f"{number:4d} {time.monotonic() - at:6.2f} s  {row}",
                    file=sys.stderr,
                    flush=True,
                )
        lasted = round(time.monotonic() - began, 1)
        return {
            "trials": trials,
            "seed": seed,
            "rows": dict(told),
            "seconds": lasted,
            **campaign.report(),
        }


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", action="append", choices=sorted({**ROWS, **BY_HAND}))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    rows = tuple(options.row or ROWS)
    line = json.dumps(run(options.trials, options.seed, rows, say=True))
    print(line)
    if options.report:
        options.report.write_text(line + "\n")


if __name__ == "__main__":
    main()
