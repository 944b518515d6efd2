"""A decode instance dies: the next attempt goes to the prefill instance that still has the prompt, which computes only what it lacks."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import body, serves_in_pairs

BLOCK = 16
PROMPTS = [[(5 * n + 11 * turn) % 300 for n in range(10 * BLOCK + 3)] for turn in range(4)]


def hit_tokens(giver: Daemon) -> float:
    """What its prefix cache has saved so far."""
    for line in str(giver.request("GET", "/metrics")[1]).splitlines():
        if line.startswith("xllm_prefix_cache_hit_tokens_total"):
            return float(line.split()[-1])
    raise AssertionError("no such metric")


def test_the_next_attempt_goes_where_the_prompt_is(slow_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, slow_model) as cluster:
        master = cluster.start_master("--load_balance_policy=RR")
        flags = (f"--block_size={BLOCK}",)
        givers = [cluster.start_instance(f"p{n}", "PREFILL", *flags) for n in range(2)]
        takers = [cluster.start_instance(f"d{n}", "DECODE", *flags) for n in range(2)]
        cluster.wait_ready()
        serves_in_pairs(master)
        before = sum(map(hit_tokens, givers))
        asked = [body(prompt, max_tokens=300, stream=True) for prompt in PROMPTS]
        pending = [Pending(master, each) for each in asked]
        for each in pending:
            each.wait_pieces(3)
        lost = takers[0].ledger()["requests_running"]
        assert lost
        takers[0].kill()
        for each in pending:
            assert each.answer().status == 200
            assert each.pieces[-1] == "[DONE]"
        rows = master.request("GET", "/debug/requests")[1]["requests"][: len(PROMPTS)]
        again = [row for row in rows if row["attempt"] > 1]
        assert len(again) == lost
        # every full block of the prompt, of each of them, at whichever of the two had computed it
        wait_for(
            "the caches to say so",
            lambda: sum(map(hit_tokens, givers)) - before >= lost * 10 * BLOCK,
        )
        cluster.daemons.remove(takers[0])
