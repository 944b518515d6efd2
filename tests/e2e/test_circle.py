"""The circle: client, master, P, D, master, client; the text of two instances is the text of one."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.kv_pair import FABRICS
from tests.e2e.cluster import Cluster, Daemon, running, wait_for

PROMPTS = [
    [(7 * i + j) % 300 for j in range(length)] for i, length in enumerate((1, 15, 16, 17, 40, 200))
]


def body(cluster: Cluster, prompt: Any, **fields: Any) -> dict[str, Any]:
    """A completions request with the cluster's model name."""
    return {"model": cluster.model.name, "prompt": prompt, "max_tokens": 24, **fields}


def text_of(daemon: Daemon, request: dict[str, Any]) -> str:
    """The answer's text; the status must be 200."""
    status, answer = daemon.request("POST", "/v1/completions", request)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.9, "seed": 11}])
def test_two_instances_say_what_one_says(
    pd_cluster: Cluster, lone_instance: Cluster, fields: dict[str, Any]
) -> None:
    master, alone = pd_cluster.daemons[0], lone_instance.daemons[0]
    for prompt in PROMPTS:
        request = body(pd_cluster, prompt, ignore_eos=True, **fields)
        assert text_of(master, request) == text_of(alone, request)


@pytest.mark.parametrize("sizes", [(16, 64), (128, 8)])
def test_instances_with_blocks_of_other_sizes_are_a_pair(
    tiny_model: Path, lone_instance: Cluster, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    alone = lone_instance.daemons[0]
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master("--suspect_after_ms=1500", "--gone_after_ms=3000")
        cluster.start_instance("prefill", "PREFILL", f"--block_size={sizes[0]}")
        decode = cluster.start_instance("decode", "DECODE", f"--block_size={sizes[1]}")
        cluster.wait_ready()
        for prompt in PROMPTS:
            request = body(cluster, prompt, temperature=0, ignore_eos=True)
            assert text_of(master, request) == text_of(alone, request)
        assert decode.ledger()["kv_bytes_received"] > 0
        (link,) = master.request("GET", "/admin/instances")[1]["instances"][0]["links"]
        assert (link["state"], link["reason"]) == ("linked", "")
        assert link["megabytes_per_s"] > 0


WAYS = [
    ("auto", "PUSH", "shared memory"),
    ("tcp", "PULL", "tcp"),
    ("auto", "PULL", "shared memory"),
    *((name, "PUSH", name) for name in FABRICS),
]


@pytest.mark.parametrize(("transport", "mode", "way"), WAYS)
def test_however_the_kv_gets_there_the_answer_is_the_same(
    tiny_model: Path, lone_instance: Cluster, tmp_path: Path, transport: str, mode: str, way: str
) -> None:
    alone = lone_instance.daemons[0]
    with running(tmp_path, tiny_model) as cluster:
        master = cluster.start_master("--suspect_after_ms=1500", "--gone_after_ms=3000")
        flags = (
            "--block_size=16",
            f"--kv_transport={transport}",
            "--kv_streams=2",
            f"--kv_cache_transfer_mode={mode}",
        )
        prefill = cluster.start_instance("prefill", "PREFILL", *flags)
        decode = cluster.start_instance("decode", "DECODE", *flags)
        cluster.wait_ready()
        for prompt in PROMPTS:
            request = body(cluster, prompt, temperature=0, ignore_eos=True)
            assert text_of(master, request) == text_of(alone, request)
        assert decode.ledger()["kv_bytes_received"] > 0
        assert f"way={way}" in prefill.log()
        (link,) = master.request("GET", "/admin/instances")[1]["instances"][0]["links"]
        assert (link["state"], link["reason"]) == ("linked", "")
        assert link["megabytes_per_s"] > 0


def test_prefill_and_decode_did_what_they_are_for(pd_cluster: Cluster) -> None:
    """A machine that is busy with more may have P keep one, and the master's log says so: then the next is asked for."""
    master, prefill, decode = pd_cluster.daemons

    def handed_over() -> Any:
        _, answer = master.request("POST", "/v1/completions", body(pd_cluster, PROMPTS[4]))
        status, record = master.request("GET", f"/debug/requests/{answer['id']}")
        assert status == 200, record
        landed = "landed" in record["moments"]
        assert landed or f"handoff request={answer['id']} result=" in master.log(), record
        return record if landed else None

    record = wait_for("a request that both serve", handed_over, 10)
    assert record["prefill_instance"].endswith(str(prefill.port))
    assert record["decode_instance"].endswith(str(decode.port))
    moments = record["moments"]
    assert moments["received"] <= moments["placed"] <= moments["admitted"] <= moments["offered"]
    assert moments["granted"] <= moments["landed"] <= moments["finished"]


def test_a_stream_ends_once_and_carries_usage(pd_cluster: Cluster) -> None:
    master = pd_cluster.daemons[0]
    request = body(
        pd_cluster, "Hello", temperature=0, ignore_eos=True, stream_options={"include_usage": True}
    )
    chunks = list(master.stream("/v1/completions", request))
    assert chunks.count("[DONE]") == 1
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"]["completion_tokens"] == 24
    whole = text_of(master, body(pd_cluster, "Hello", temperature=0, ignore_eos=True))
    streamed = "".join(c["choices"][0]["text"] for c in chunks[:-1] if c["choices"])
    assert streamed == whole


def test_a_prompt_seen_before_is_not_computed_again(pd_cluster: Cluster) -> None:
    master, _, decode = pd_cluster.daemons
    request = body(pd_cluster, [299, *PROMPTS[5]], temperature=0, ignore_eos=True)
    texts, cached, received = [], [], []
    for _ in range(2):
        before = decode.ledger()["kv_bytes_received"]
        status, answer = master.request("POST", "/v1/completions", request)
        assert status == 200, answer
        texts.append(answer["choices"][0]["text"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        received.append(decode.ledger()["kv_bytes_received"] - before)
    assert texts[0] == texts[1]
    assert cached == [0, 192]  # 201 tokens in blocks of 16
    assert received[1] * 13 == received[0]  # only the partial block travels again


def test_an_answer_that_a_stop_string_ends_tells_what_was_cached(pd_cluster: Cluster) -> None:
    master, _, _ = pd_cluster.daemons
    request = body(pd_cluster, [297, *PROMPTS[5]], temperature=0, ignore_eos=True)
    status, whole = master.request("POST", "/v1/completions", request)
    assert status == 200, whole
    stop = whole["choices"][0]["text"][3:5]
    status, answer = master.request("POST", "/v1/completions", {**request, "stop": [stop]})
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


def test_a_flush_forgets_what_was_cached(pd_cluster: Cluster) -> None:
    master, prefill, decode = pd_cluster.daemons
    request = body(pd_cluster, [298, *PROMPTS[5]], temperature=0, ignore_eos=True)
    cached = []
    for _ in range(2):
        status, answer = master.request("POST", "/v1/completions", request)
        assert status == 200, answer
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        for daemon in (prefill, decode):
            wait_for("all blocks back", daemon.idle, 10)
            status, counts = daemon.request("POST", "/debug/flush_cache", {})
            assert status == 200, counts
            assert counts["free"] == counts["total"] > 0
            assert counts["cached"] == 0
    assert cached == [0, 0]


def test_one_token_is_an_ordinary_finish(pd_cluster: Cluster) -> None:
    status, answer = pd_cluster.daemons[0].request(
        "POST", "/v1/completions", body(pd_cluster, "Hi", max_tokens=1, ignore_eos=True)
    )
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_instances_answer_on_their_own_port(pd_cluster: Cluster) -> None:
    request = body(pd_cluster, PROMPTS[3], temperature=0, ignore_eos=True)
    texts = {text_of(daemon, request) for daemon in pd_cluster.daemons}
    assert len(texts) == 1


def _leave_at_random(daemon: Daemon, request: dict[str, Any], num_chunks: int) -> None:
    """Read so many chunks of a stream, then close the connection."""
    stream = daemon.stream("/v1/completions", request)
    for _, _chunk in zip(range(num_chunks), stream, strict=False):
        pass
    stream.close()


def test_two_hundred_mixed_requests_leave_nothing_behind(pd_cluster: Cluster) -> None:
    master, prefill, decode = pd_cluster.daemons
    for instance in (prefill, decode):
        wait_for("an idle start", instance.idle)
    before = {d.name: d.ledger()["file_handles"] for d in pd_cluster.daemons}
    chooser = random.Random(5)
    ended: list[int] = []
    lock = threading.Lock()

    def one(number: int) -> None:
        prompt = [chooser.randrange(300) for _ in range(chooser.randrange(1, 180))]
        request = body(
            pd_cluster, prompt, max_tokens=chooser.randrange(1, 60), seed=number, ignore_eos=True
        )
        kind = number % 3
        if kind == 0:
            status, answer = master.request("POST", "/v1/completions", request)
            assert status == 200, answer
        elif kind == 1:
            assert list(master.stream("/v1/completions", request))[-1] == "[DONE]"
        else:
            _leave_at_random(master, request, chooser.randrange(0, 20))
        with lock:
            ended.append(number)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(200)))
    assert len(ended) == 200
    for instance in (prefill, decode):
        wait_for(f"all blocks of {instance.name} back", instance.idle, 10)
    wait_for("the master to forget", lambda: master.ledger()["open_requests"] == 0, 10)
    for daemon in pd_cluster.daemons:
        wait_for(
            f"the file handles of {daemon.name}",
            lambda daemon=daemon: daemon.ledger()["file_handles"] <= before[daemon.name] + 2,
            10,
        )
