"""Requests brought into a phase, and what the ledgers must show then; for the tests of cancels and losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.e2e.cluster import Cluster, Daemon, wait_for
from tests.e2e.pending import Pending
from xllm_py.base.clock import RealClock

CATCH_S = 1.5  # less than it takes others to give up a process that stands still
LONG_PROMPT = [(3 * n) % 300 for n in range(1600)]


def body(prompt: list[int], **fields: Any) -> dict[str, Any]:
    """A request that ends by its length only, and has one right answer."""
    fixed = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return {**fixed, "prompt": prompt, **fields}


def shows(instance: Daemon, counts: dict[str, int]) -> bool:
    """Whether the ledger shows these counts now."""
    ledger = instance.ledger()
    return all(ledger[name] == count for name, count in counts.items())


def caught(pending: Pending, instance: Daemon, **counts: int) -> bool:
    """Wait until the ledger shows these counts; False when the moment was missed: the request is over, or nothing moves."""
    deadline = RealClock().now() + CATCH_S
    while not pending.over and RealClock().now() < deadline:
        if shows(instance, counts):
            return True
    return False


def reaches(instance: Daemon, **counts: int) -> None:
    """Wait until the ledger shows these counts."""
    wait_for(f"{instance.name} to show {counts}", lambda: shows(instance, counts))


@contextlib.contextmanager
def in_handoff(cluster: Cluster) -> Iterator[Pending]:
    """A request whose handoff cannot end, because D's API process stands still; its first token is with the master already."""
    master, prefill, decode = cluster.daemons
    for turn in range(20):
        # too long a prompt is not computed in CATCH_S by a busy machine, too short a one is over before D stands still;
        # each begins in its own way, since of what D has in its prefix cache there is nothing to hand over
        pending = Pending(master, body([turn, *LONG_PROMPT[: 200 >> turn % 4]]))
        if caught(pending, prefill, kv_grants_given=1):
            with decode.frozen(engine_too=False):
                if caught(pending, prefill, requests_giving=1):
                    wait_for("the first token", lambda: "first_token" in newest(master)["moments"])
                    yield pending
                    return
        serves_in_pairs(master)
    raise AssertionError("20 requests, and none was caught in its handoff")


def newest(master: Daemon) -> dict[str, Any]:
    """What the master remembers of the request that came last."""
    status, listed = master.request("GET", "/debug/requests")
    assert status == 200, listed
    record = listed["requests"][0]
    assert isinstance(record, dict)
    return record


def all_let_go(master: Daemon, *instances: Daemon) -> None:
    """Nothing of any request is left anywhere."""
    for instance in instances:
        wait_for(f"all blocks of {instance.name} back", instance.idle, 10)
    wait_for("the master to forget", lambda: master.ledger()["open_requests"] == 0, 10)


def serves_in_pairs(master: Daemon) -> None:
    """Wait until P and D are linked, and serve a request by both."""

    def mode() -> bool:
        status, state = master.request("GET", "/ready")
        return status == 200 and state["mode"] == "pd"

    wait_for("a linked pair", mode)
    status, answer = master.request("POST", "/v1/completions", body([7, 9]))
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 8
    assert newest(master)["mode"] == "pd"
