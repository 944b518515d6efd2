"""An instance is made to leave by hand: what it runs goes on elsewhere, or is let finish; it ends with 0 either way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import body, newest, serves_in_pairs
from tests.e2e.test_losses import text_of

ASKED = body([7, 9], max_tokens=1500, temperature=0.9, seed=3, stream=True)


def drain(master: Daemon, name: str, order: object = None) -> tuple[int, object]:
    return master.request("POST", f"/admin/instances/{name}/drain", order)


@pytest.mark.parametrize("mode", ["move", "finish"])
def test_a_stream_survives_the_draining_of_its_decode_instance(
    tiny_model: Path, tmp_path: Path, mode: str
) -> None:
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        cluster.start_instance("prefill", "PREFILL", "--block_size=16")
        decodes = [cluster.start_instance(f"d{n}", "DECODE", "--block_size=16") for n in range(2)]
        cluster.wait_ready()
        serves_in_pairs(master)
        whole = text_of(Pending(master, ASKED))
        pending = Pending(master, ASKED)
        pending.wait_pieces(5)
        name = newest(master)["decode_instance"]
        (leaving,) = [each for each in decodes if name.endswith(f":{each.port}")]
        status, told = drain(master, name, {"mode": mode})
        assert (status, told) == (202, {"name": name, "mode": mode, "open_requests": 1})
        assert text_of(pending) == whole
        assert newest(master)["attempt"] == (2 if mode == "move" else 1)
        assert leaving.process.wait(10) == 0
        cluster.daemons.remove(leaving)
        serves_in_pairs(master)  # the other one
        wait_for("it to be gone", lambda: drain(master, name)[0] in (404, 503), 5)


def test_what_cannot_be_drained_is_said(direct_cluster: object) -> None:
    master = direct_cluster.daemons[0]  # type: ignore[attr-defined]
    assert drain(master, "nobody:1")[0] == 404
    name = (
        newest(master)["decode_instance"]
        if master.request("GET", "/debug/requests")[1]["requests"]
        else "x"
    )
    for order in ({"mode": "now"}, {"timeout_s": -1}, {"timeout_s": "soon"}, ["finish"]):
        status, answer = drain(master, name, order)
        assert (status, answer["error"]["code"]) == (400, "invalid_value")  # type: ignore[index]
