"""Data parallel: an instance of two engines gives and takes like one, and dies like one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import LONG_PROMPT, body, serves_in_pairs

PROMPTS = [LONG_PROMPT[: 20 + 9 * n] for n in range(8)]
TWO = ("--devices=cpu:0,cpu:1", "--dp_size=2")


def engines(daemon: Daemon) -> list[int]:
    return [each.pid for each in daemon.processes() if "xllm_py.engine" in each.cmdline()]


@pytest.mark.parametrize("mode", ["PUSH", "PULL"])
def test_two_engines_on_either_side_give_the_text_of_one_and_end_together(
    tiny_model: Path, tmp_path: Path, mode: str
) -> None:
    flags = f"--kv_cache_transfer_mode={mode}"
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master()
        give = cluster.start_instance("p", "PREFILL", flags, *TWO)
        take = cluster.start_instance("d", "DECODE", flags, *TWO)
        spare = cluster.start_instance("d2", "DECODE", flags)
        cluster.wait_ready()
        serves_in_pairs(master)
        assert len(engines(give)) == len(engines(take)) == 2
        wanted = [
            master.request("POST", "/v1/completions", body(prompt, max_tokens=300))[1]
            for prompt in PROMPTS
        ]
        requests = master.request("GET", "/debug/requests")[1]["requests"][: len(PROMPTS)]
        assert {row["mode"] for row in requests} == {"pd"}
        at_once = [Pending(master, body(prompt, max_tokens=300)) for prompt in PROMPTS]
        wait_for("work at both", lambda: take.ledger()["active"] > 0)
        os.kill(engines(take)[1], signal.SIGKILL)
        assert take.process.wait(10) == 7
        for pending, answer in zip(at_once, wanted, strict=True):
            got = pending.answer()
            assert got.status == 200, got.body
            assert got.body["choices"] == answer["choices"]
        wait_for("nothing left", lambda: give.idle() and spare.idle())
