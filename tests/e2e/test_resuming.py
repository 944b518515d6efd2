"""Answers with an Idempotency-Key outlive connections and masters."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.phases import all_let_go, body, newest, serves_in_pairs

# no seed: what the two masters draw must be the same
LONG = 1800  # tokens: it does not end before the other master is asked
ASKED = body([5, 8], max_tokens=600, temperature=0.9, stream=True)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A registry of its own, two masters, P and D."""
    with running(tmp_path_factory.mktemp("resuming"), tiny_model) as made:
        made.start_registry()
        for _ in range(2):
            made.start_master()
        made.start_instance("prefill", "PREFILL", "--block_size=16")
        made.start_instance("decode", "DECODE", "--block_size=16")
        made.wait_ready(*made.daemons[1:])
        for master in masters(made):
            serves_in_pairs(master)
        yield made


def masters(cluster: Cluster) -> list[Daemon]:
    return cluster.daemons[1:3]


class Lines:
    """One connection whose events are read as the test likes."""

    def __init__(
        self, daemon: Daemon, method: str, path: str, asked: Any = None, **headers: str
    ) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
        raw = None if asked is None else json.dumps(asked).encode()
        sent = {"content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, raw, sent)
        self.response = self.connection.getresponse()
        self.last_id = ""
        self.ended = False

    def text(self, pieces: int = 1 << 30) -> str:
        """Of so many more events with text, or of all."""
        said = []
        while len(said) < pieces:
            line = self.response.readline()
            if not line:
                break
            if line.startswith(b"id: "):
                self.last_id = line[4:].strip().decode()
            elif line.startswith(b"data: [DONE]"):
                self.ended = True
            elif line.startswith(b"data: "):
                text = json.loads(line[6:])["choices"][0]["text"]
                if text:
                    said.append(text)
        return "".join(said)

    def close(self) -> None:
        self.connection.close()


def post(daemon: Daemon, key: str, asked: Any = ASKED, **headers: str) -> Lines:
    return Lines(daemon, "POST", "/v1/completions", asked, idempotency_key=key, **headers)


def test_a_connection_that_is_lost_is_gone_on_with(cluster: Cluster) -> None:
    master = masters(cluster)[0]
    first = post(master, "one")
    head = first.text(20)
    request_id, _, position = first.last_id.rsplit(":", 2)
    first.close()
    by_path = Lines(master, "GET", f"/v1/streams/{request_id}?starting_after={position}")
    tail = by_path.text()
    assert by_path.ended
    by_key = post(master, "one", last_event_id=first.last_id)
    assert by_key.text() == tail
    again = post(master, "one")
    assert again.text() == head + tail
    assert newest(master)["request_id"].startswith(request_id)  # nothing was computed twice
    assert master.request("GET", f"/debug/requests/{request_id}")[0] == 200
    all_let_go(master, *cluster.daemons[3:])


def test_many_with_one_key_get_one_answer(cluster: Cluster) -> None:
    master = masters(cluster)[0]
    asked = {**ASKED, "stream": False}

    def ask(_: int) -> Any:
        headers = {"idempotency-key": "many"}
        return master.exchange("POST", "/v1/completions", json.dumps(asked).encode(), headers).body

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["usage"]["completion_tokens"] == 600
    other = json.dumps({**asked, "max_tokens": 3}).encode()
    refused = master.exchange("POST", "/v1/completions", other, {"idempotency-key": "many"})
    assert (refused.status, refused.error["code"]) == (409, "idempotency_conflict")


def test_what_is_not_kept_is_said(cluster: Cluster) -> None:
    master = masters(cluster)[0]
    short = post(master, "short")
    short.text()
    request_id = short.last_id.rsplit(":", 2)[0]
    assert master.request("GET", "/v1/streams/nothing")[0] == 404
    path = f"/v1/streams/{request_id}?starting_after="
    assert master.request("GET", f"{path}600")[0] == 416
    assert master.request("GET", f"{path}x")[0] == 400


def num_computed(cluster: Cluster) -> float:
    """Tokens that the instances have sampled so far."""
    return sum(
        float(line.split()[-1])
        for daemon in cluster.daemons[3:]
        for line in str(daemon.request("GET", "/metrics")[1]).splitlines()
        if line.startswith("xllm_engine_tokens_total ")
    )


@contextlib.contextmanager
def engine_held(instance: Daemon) -> Iterator[None]:
    """Its engine stands still: what it computes does not end before another master is asked."""
    processes = instance.processes()[1:]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@pytest.mark.parametrize("way", ["key", "id"])
def test_another_master_goes_on_when_one_is_killed_and_computes_nothing_twice(
    cluster: Cluster, way: str
) -> None:
    (one, other), decode = masters(cluster), cluster.daemons[4]
    before, asked = num_computed(cluster), {**ASKED, "max_tokens": LONG}
    taken_over = decode.log().count("taken over by another master")
    first = post(one, way, asked)
    head = first.text(60)
    with engine_held(decode):
        one.process.kill()  # not `kill`, which waits for its children: the engine must not look stuck
        one.process.wait()
        if way == "key":
            tail = post(other, way, asked, last_event_id=first.last_id)
        else:
            request_id, _, position = first.last_id.rsplit(":", 2)
            path = f"/v1/streams/{request_id}?starting_after={position}"
            tail = Lines(other, "GET", path)
        assert tail.response.status == 200
    rest = tail.text()
    assert tail.ended
    assert decode.log().count("taken over by another master") == taken_over + 1
    assert tail.last_id.rsplit(":", 2)[0] == first.last_id.rsplit(":", 2)[0]
    assert post(other, way, asked).text() == head + rest
    wait_for("the engines' word", lambda: num_computed(cluster) - before >= LONG)
    # twice: the last token known, and what D said until its engine heard that another master has it
    assert num_computed(cluster) - before <= LONG + 100
    one.start()
    cluster.wait_ready(one)
    wait_for(
        "the killed master's requests to end",
        lambda: all(d.idle() for d in cluster.daemons[3:]),
        20,
    )
