"""Cache-aware routing with real instances: it knows what they have cached, and a decode instance that has a prompt serves it alone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.cluster import Daemon, running, wait_for
from tests.e2e.phases import body, newest, serves_in_pairs

PROMPT = [(11 * n) % 300 for n in range(160)]


def ask(master: Daemon, prompt: list[int], **fields: object) -> tuple[str, dict[str, object], int]:
    """Text, what is remembered of it, and how much was cached."""
    status, answer = master.request("POST", "/v1/completions", body(prompt, **fields))
    assert status == 200, answer
    details = answer["usage"]["prompt_tokens_details"] or {}
    return answer["choices"][0]["text"], newest(master), details.get("cached_tokens", 0)


def why(master: Daemon, prompt: list[int]) -> str:
    """As the answer's header says it."""
    raw = json.dumps(body(prompt)).encode()
    answer = master.exchange("POST", "/v1/completions", raw, {"x-xllm-explain": "1"})
    assert answer.status == 200
    return answer.headers["x-xllm-route"]


def known_blocks(master: Daemon, *names: object) -> int:
    """How many the instance with the fewest has, as the master knows."""
    rows = master.request("GET", "/admin/instances")[1]["instances"]
    return min(row["policy"]["cached_blocks"] for row in rows if row["name"] in names)


def test_prompts_go_to_where_they_are_cached(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master("--load_balance_policy=CAR")
        for number in (1, 2):
            cluster.start_instance(f"p{number}", "PREFILL", "--block_size=16")
            cluster.start_instance(f"d{number}", "DECODE", "--block_size=16")
        cluster.wait_ready()
        serves_in_pairs(master)
        text, record, cached = ask(master, PROMPT)
        assert record["mode"] == "pd"
        assert record["prefill_instance"] != record["decode_instance"]
        assert cached == 0
        both = record["prefill_instance"], record["decode_instance"]
        wait_for("the news of both", lambda: known_blocks(master, *both) >= len(PROMPT) // 16)

        def served_by_decode_alone() -> bool:
            same, again, cached = ask(master, PROMPT)
            assert same == text
            assert cached >= len(PROMPT) - 16
            alone = again["prefill_instance"] == again["decode_instance"]
            return alone and again["decode_instance"] == record["decode_instance"]

        # where that is cheaper, and on a busy machine it may not seem so at first
        wait_for("the decode instance to serve it alone", served_by_decode_alone)

        longer = PROMPT + [7] * 100  # too long a tail for D alone: P has the beginning too
        _, record_longer, cached = ask(master, longer)
        assert record_longer["prefill_instance"] == record["prefill_instance"]
        assert cached == len(PROMPT)

        assert "CAR: " in why(master, longer)
        _, _, cached = ask(master, PROMPT, cache_salt="other")
        assert cached == 0  # nobody else's

        # the new life of an instance has nothing, and the index knows
        (holder,) = [
            each
            for each in cluster.daemons
            if str(record["decode_instance"]).endswith(f":{each.port}")
        ]
        holder.kill()
        holder.start()
        cluster.wait_ready()
        same, record_reborn, _ = ask(master, PROMPT)
        assert same == text
        assert record_reborn["prefill_instance"] == record["prefill_instance"]


def test_a_target_that_cannot_be_kept_now_is_refused_at_once(
    slow_model: Path, tmp_path: Path
) -> None:
    """One instance that computes one token a step; its queue is too long for one more, and says when not to be any more."""
    from tests.e2e.pending import Pending

    with running(tmp_path, slow_model) as cluster:
        master = cluster.start_master("--load_balance_policy=SLO_AWARE", "--target_ttft=600")
        slowly = ("--max_tokens_per_chunk_for_prefill=1", "--enable_prefix_cache=false")
        cluster.start_instance("x", "DEFAULT", "--block_size=16", "--max_seqs_per_batch=1", *slowly)
        cluster.wait_ready()
        wait_for("the master", lambda: master.is_ready())
        for n in range(6):
            ask(master, [n] * 30 * (n + 1), max_tokens=1)  # it learns what they cost
        waiting = [Pending(master, body([n] * 1500, max_tokens=1)) for n in range(4)]
        wait_for("the queue", lambda: master.ledger()["open_requests"] == 4)
        answer = Pending(master, body([9] * 30, max_tokens=1)).answer(2.0)
        assert (answer.status, answer.error["code"]) == (429, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        for each in waiting:
            each.leave()
