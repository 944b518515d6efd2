"""The client leaves in the queue, in prefill, during the handoff, while decoding: P and D let go at once, and the record says so.

The slow cluster makes each phase long: P computes one token a step of one request at a time.
"""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster, Daemon, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import (
    LONG_PROMPT,
    all_let_go,
    body,
    in_handoff,
    newest,
    reaches,
    serves_in_pairs,
)


def was_cancelled(master: Daemon, *, after: str, without: str) -> None:
    """The newest record: cancelled, between these moments of the journey."""
    record = newest(master)
    assert record["state"] == "cancelled"
    assert after in record["moments"]
    assert without not in record["moments"]


def test_a_client_that_leaves_in_the_queue_is_taken_out_of_it(slow_cluster: Cluster) -> None:
    master, prefill, decode = slow_cluster.daemons
    first = Pending(master, body(LONG_PROMPT))
    reaches(prefill, requests_running=1)
    second = Pending(master, body(LONG_PROMPT))
    reaches(prefill, requests_running=1, requests_waiting=1)
    second.leave()
    reaches(prefill, requests_running=1, requests_waiting=0, requests_open=1)
    was_cancelled(master, after="placed", without="admitted")
    first.leave()
    all_let_go(master, prefill, decode)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_prefill_frees_both_sides(
    slow_cluster: Cluster, stream: bool
) -> None:
    master, prefill, decode = slow_cluster.daemons
    pending = Pending(master, body(LONG_PROMPT, stream=stream))
    reaches(prefill, requests_running=1, giving=1)
    reaches(decode, requests_reserved=1, staged=len(LONG_PROMPT) // 16)
    pending.leave()
    all_let_go(master, prefill, decode)
    was_cancelled(master, after="placed", without="first_token")


def test_a_client_that_leaves_during_the_handoff_frees_p_though_d_is_silent(
    slow_cluster: Cluster,
) -> None:
    """D's API process stands still: its engine holds the KV, but nobody takes P's first token."""
    master, prefill, decode = slow_cluster.daemons
    with in_handoff(slow_cluster) as pending:
        pending.leave()
        wait_for("all blocks of P back", prefill.idle, 10)
    all_let_go(master, prefill, decode)
    was_cancelled(master, after="first_token", without="landed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_d_decodes_frees_d(slow_cluster: Cluster, stream: bool) -> None:
    master, prefill, decode = slow_cluster.daemons
    pending = Pending(master, body([7, 9], max_tokens=1900, stream=stream))
    if stream:
        pending.wait_pieces(3)
    reaches(decode, requests_running=1)
    reaches(prefill, requests_open=0)
    pending.leave()
    all_let_go(master, prefill, decode)
    was_cancelled(master, after="first_token", without="landed")


def test_a_client_of_a_lone_instance_that_leaves_is_cancelled(lone_instance: Cluster) -> None:
    instance = lone_instance.daemons[0]
    pending = Pending(instance, body([7, 9], max_tokens=2000, stream=True))
    pending.wait_pieces(1)
    reaches(instance, requests_running=1)
    pending.leave()
    wait_for("all blocks back", instance.idle, 10)
    status, record = instance.request("GET", f"/debug/requests/{pending.pieces[0]['id']}")
    assert (status, record["state"]) == (200, "cancelled")


def test_after_all_that_a_request_is_served(slow_cluster: Cluster) -> None:
    master, prefill, decode = slow_cluster.daemons
    serves_in_pairs(master)
    record = newest(master)
    assert record["state"] == "finished"
    assert record["decode_instance"].endswith(f":{decode.port}")
    all_let_go(master, prefill, decode)
