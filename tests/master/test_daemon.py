"""`xllm-master` as a process: it starts without torch, answers, says why it is not ready, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.master.support import KEY, FakeInstance, until
from tests.ports import free_port
from xllm_py.base.clock import RealClock
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.service_info import service_from_json
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import open_registry
from xllm_py.registry.cluster_key import cluster_key_of
from xllm_py.registry.embedded import serve_embedded

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes' letters and no chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {chr(code): code - 32 for code in range(32, 127)}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Poll with a deadline."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S} s for {what}")


class Daemon:
    """One process and its ports."""

    def __init__(self, model: Path, log: Path, *flags: str) -> None:
        self.http, self.rpc, self.etcd = free_port(), free_port(), free_port()
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "importtime", "-m", "xllm_py.cli.xllm_master"),
                    f"--tokenizer_path={model}",
                    f"--etcd_addr=127.0.0.1:{self.etcd}",
                    f"--http_server_port={self.http}",
                    f"--rpc_server_port={self.rpc}",
                    "--debug_endpoints=true",
                    *flags,
                ],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def get(self, path: str) -> tuple[int, Any]:
        """(status, JSON); status 0 while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
            except OSError:
                return 0, None
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def said(self, text: str) -> bool:
        """Whether the log has it."""
        return text in self.log.read_text(errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal and wait."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons that are gone at the end of the test."""
    daemons: list[Daemon] = []

    def make(*flags: str) -> Daemon:
        daemons.append(Daemon(model, tmp_path / f"{len(daemons)}.log", *flags))
        return daemons[-1]

    yield make
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


def test_it_starts_without_torch_says_why_it_waits_and_stops_in_order(
    start: Callable[..., Daemon],
) -> None:
    daemon = start("--embedded_etcd=true")
    wait_for("the ready line", lambda: daemon.said(" ready http="))
    assert daemon.get("/health") == (200, {"status": "healthy"})
    status, body = daemon.get("/ready")
    assert (status, body["reasons"]) == (503, ["no_instances"])
    assert daemon.get("/v1/models")[1]["data"] == []
    status, body = daemon.get("/admin/instances")
    assert (status, body["instances"]) == (200, [])
    wait_for("its election", lambda: daemon.get("/admin/instances")[1]["election"]["leads"])
    assert daemon.get("/debug/requests/none")[0] == 404
    ledger = daemon.get("/debug/ledger")[1]
    assert [ledger[name] for name in ("open_requests", "attempts", "log_tokens", "streams")] == [
        0
    ] * 4
    assert ledger["resident_bytes"] <= 120 * 1024 * 1024
    loaded = {line.rpartition("|")[2].strip() for line in daemon.log.read_text().splitlines()}
    assert "grpc" in loaded
    assert not loaded & {"torch", "transformers", "safetensors", "numpy"}
    assert daemon.end() == 0
    assert daemon.said("stopped")


def test_a_hangup_ends_nothing(start: Callable[..., Daemon]) -> None:
    daemon = start("--embedded_etcd=true")
    wait_for("the ready line", lambda: daemon.said(" ready http="))
    daemon.process.send_signal(signal.SIGHUP)
    wait_for("its word", lambda: daemon.said(" hangup "))
    assert daemon.get("/health")[0] == 200
    assert daemon.end() == 0


def test_health_is_answered_while_the_registry_is_awaited(start: Callable[..., Daemon]) -> None:
    daemon = start("--etcd_start_timeout_s=60")
    wait_for("health", lambda: daemon.get("/health")[0] == 200)
    assert daemon.get("/ready")[1]["reasons"] == ["loading"]
    assert daemon.get("/admin/instances")[0] == 503
    assert daemon.end() == 0


def test_no_registry_ends_the_start_with_its_code(start: Callable[..., Daemon]) -> None:
    daemon = start("--etcd_start_timeout_s=0.2")
    assert daemon.process.wait(WAIT_S) == 6
    assert daemon.said("xllm-master: error: ")


@pytest.mark.parametrize("which", ["http_server_port", "rpc_server_port"])
def test_a_busy_port_ends_the_start_at_once(start: Callable[..., Daemon], which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon = start(f"--{which}={port}", "--etcd_start_timeout_s=60")
        assert daemon.process.wait(WAIT_S) == 5
    assert daemon.said(str(port))


async def _until(what: str, ask: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again and again, with a deadline."""
    deadline = time.monotonic() + WAIT_S
    while not (value := await ask()):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        await asyncio.sleep(0.02)
    return value


async def test_the_own_record_is_in_the_registry_and_goes_with_the_master(
    start: Callable[..., Daemon],
) -> None:
    clock = RealClock()
    embedded = await serve_embedded("127.0.0.1:0", clock=clock)
    address = f"127.0.0.1:{embedded.port}"
    daemon = start(f"--etcd_addr={address}")
    registry = await open_registry(EtcdSlice(address=address), clock)
    key = keys.service(f"127.0.0.1:{daemon.rpc}")
    raw = await _until("the record", lambda: registry.get(key))
    record = service_from_json(raw, await cluster_key_of(registry))
    assert record.rpc_address == f"127.0.0.1:{daemon.rpc}"
    assert record.http_address == f"127.0.0.1:{daemon.http}"
    daemon.process.send_signal(signal.SIGTERM)

    async def is_gone() -> bool:
        return await registry.get(key) is None

    await _until("the record's end", is_gone)
    await registry.close()
    await embedded.close()
    assert await asyncio.to_thread(daemon.process.wait, WAIT_S) == 0


def read_until(answer: http.client.HTTPResponse, text: bytes) -> None:
    """Lines of an event stream up to the one that holds a text."""
    while text not in (line := answer.readline()):
        assert line, f"the stream ended before {text!r}"


async def test_open_streams_end_in_order_when_the_master_must_leave(
    start: Callable[..., Daemon], tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    key_file.chmod(0o600)
    embedded = await serve_embedded("127.0.0.1:0", clock=RealClock())
    address = f"127.0.0.1:{embedded.port}"
    daemon = start(
        f"--etcd_addr={address}", f"--cluster_key_file={key_file}", "--drain_timeout_s=60"
    )
    registry = await open_registry(EtcdSlice(address=address), RealClock())
    await asyncio.to_thread(wait_for, "the ready line", lambda: daemon.said(" ready http="))
    place: Any = SimpleNamespace(address=f"127.0.0.1:{daemon.rpc}", registry=registry)
    instance = await FakeInstance(place, "a", Role.DEFAULT, vocab_size=95).start()
    ready = await asyncio.to_thread(
        wait_for, "readiness", lambda: daemon.get("/ready")[0] == 200 and daemon.get("/ready")
    )
    assert ready[1]["mode"] == "default"

    body = {"model": "m", "prompt": [1, 2], "max_tokens": 8, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", daemon.http, timeout=WAIT_S)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    order = (await until("the submission", lambda: instance.submissions))[0]
    await instance.say(0, 40, request_id=order.request_id)
    answer = await asyncio.to_thread(connection.getresponse)
    await asyncio.to_thread(read_until, answer, b'"text":"H"')

    daemon.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(
        wait_for, "draining", lambda: daemon.get("/ready")[1].get("reasons") == ["draining"]
    )
    assert daemon.process.poll() is None
    await instance.say(1, 41, request_id=order.request_id)
    await asyncio.to_thread(read_until, answer, b'I"')
    daemon.process.send_signal(signal.SIGTERM)
    rest = await asyncio.to_thread(answer.read)
    assert b'"code":"draining"' in rest
    assert b"[DONE]" not in rest
    await until("the cancel", lambda: instance.cancelled == [(order.request_id, 1)])
    assert await asyncio.to_thread(daemon.process.wait, WAIT_S) == 0
    connection.close()
    await instance.stop()
    await registry.close()
    await embedded.close()
