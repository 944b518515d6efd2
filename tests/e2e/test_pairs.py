"""Which instances serve together: pairs that do not fit are refused and say why; DEFAULT, a lone P and a lone D serve alone.

One cluster for all: a P and two Ds of which none fits. The tests go on from each other's end, in the order they stand here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.phases import body, newest

DIFFERENT = {"dtype": "dtype", "model": "model_fingerprint"}


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Master, P, and a D each of another dtype and of another model under the same name."""
    other = make_checkpoint(
        tmp_path_factory.mktemp("other") / "tiny", seed=99, layers=3, with_tokenizer=True
    )
    with running(tmp_path_factory.mktemp("pairs"), tiny_model) as made:
        made.start_master()
        made.start_instance("prefill", "PREFILL", "--block_size=16")
        made.start_instance("dtype", "DECODE", "--block_size=16", "--dtype=bfloat16")
        made.start_instance("model", "DECODE", "--block_size=16", f"--model={other}")
        made.wait_ready(*made.daemons[1:])
        yield made


def named(cluster: Cluster, name: str) -> Daemon:
    """One of the cluster's daemons."""
    return next(daemon for daemon in cluster.daemons if daemon.name == name)


def admin(master: Daemon) -> dict[int, dict[str, Any]]:
    """/admin/instances by HTTP port."""
    status, listed = master.request("GET", "/admin/instances")
    assert status == 200, listed
    return {int(row["name"].rpartition(":")[2]): row for row in listed["instances"]}


def has_mode(master: Daemon, mode: str) -> None:
    """Wait for it, and serve a request in it."""

    def shown() -> bool:
        status, state = master.request("GET", "/ready")
        return status == 200 and state["mode"] == mode

    wait_for(f"mode {mode}", shown)
    status, answer = master.request("POST", "/v1/completions", body([7, 9], temperature=0))
    assert status == 200, answer
    assert newest(master)["mode"] == mode


def test_pairs_that_differ_are_refused_and_ready_says_why(cluster: Cluster) -> None:
    master = cluster.daemons[0]

    def refused() -> list[str]:
        status, state = master.request("GET", "/ready")
        assert status == 503
        told = [text for text in state["details"] if ": differs (" in text]
        return told if len(told) == len(DIFFERENT) else []

    details = wait_for("two refused pairs", refused)
    for name, differs in DIFFERENT.items():
        (text,) = [each for each in details if f":{named(cluster, name).port}:" in each]
        assert f"{differs} differs: " in text
    assert master.request("GET", "/ready")[1]["reasons"] == ["no_compatible_decode"]


def test_each_refusal_is_one_line_in_both_logs(cluster: Cluster) -> None:
    master = cluster.daemons[0]
    giver = named(cluster, "prefill").port
    for name, differs in DIFFERENT.items():
        decode = named(cluster, name)
        pair = rf"W .* pair prefill \S+:{giver} and decode \S+:{decode.port}: differs \(.*{differs} differs: "
        wait_for("the master's line", lambda pair=pair: re.search(pair, master.log()))
        assert len(re.findall(pair, master.log())) == 1
        own = rf"W .* giver refused giver=\S+:{giver} reason=.*{differs} differs: "
        assert len(re.findall(own, decode.log())) == 1, decode.tail()


def test_admin_shows_the_reason_at_both_ends_of_a_pair(cluster: Cluster) -> None:
    rows = admin(cluster.daemons[0])
    giver = rows[named(cluster, "prefill").port]
    assert {link["state"] for link in giver["links"]} == {"differs"}
    for name, differs in DIFFERENT.items():
        (link,) = rows[named(cluster, name).port]["links"]
        assert (link["peer"], link["state"]) == (giver["name"], "differs")
        assert f"{differs} differs: " in link["reason"]


def test_without_a_pair_that_fits_a_request_is_503(cluster: Cluster) -> None:
    raw = json.dumps(body([7, 9])).encode()
    answer = cluster.daemons[0].exchange("POST", "/v1/completions", raw)
    assert (answer.status, answer.error["code"]) == (503, "no_compatible_decode")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_default_instance_serves_beside_pairs_that_cannot(cluster: Cluster) -> None:
    master = cluster.daemons[0]
    alone = cluster.start_instance("default", "DEFAULT", "--block_size=16")
    has_mode(master, "default")
    assert newest(master)["prefill_instance"].endswith(f":{alone.port}")
    assert alone.stop() == 0
    wait_for("it to be gone", lambda: master.request("GET", "/ready")[0] == 503)


def test_ds_without_any_p_serve_whole_requests(cluster: Cluster) -> None:
    master, prefill = cluster.daemons[:2]
    with prefill.frozen(engine_too=True):
        has_mode(master, "degraded")
        ports = {named(cluster, name).port for name in DIFFERENT}
        assert int(newest(master)["prefill_instance"].rpartition(":")[2]) in ports


def test_a_p_without_any_d_serves_whole_requests(cluster: Cluster) -> None:
    master, prefill = cluster.daemons[:2]
    for name in DIFFERENT:
        assert named(cluster, name).stop() == 0
    has_mode(master, "degraded")
    assert newest(master)["prefill_instance"].endswith(f":{prefill.port}")
    assert prefill.log().count("Traceback") == 0
