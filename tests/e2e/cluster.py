"""A whole cluster of real processes on free loopback ports, for the end-to-end tests and smoke benchmarks.

Every daemon is started from this checkout's `bin/` launchers, logs to its own file, and is stopped by pid.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0


def wait_for(what: str, condition: Any, timeout_s: float = 30.0) -> Any:
    """Poll until the condition is true; the message says what was awaited."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: Any  # JSON where it is JSON, else text

    @property
    def error(self) -> dict[str, Any]:
        """The error object; no answer without one is asked for it."""
        assert isinstance(self.body, dict), self.body
        error = self.body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


@dataclass
class Daemon:
    """One process, its HTTP port and its log. A restarted one is the same Daemon with another process."""

    name: str
    command: list[str]
    env: dict[str, str]
    port: int
    log_file: Path
    tls: ssl.SSLContext | None = None  # its port speaks HTTPS
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        """Start it."""
        self.start()

    def start(self) -> None:
        """A new process with the same command; its log goes on where the last one ended."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **self.env}
            )

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout_s, context=self.tls
        )

    def exchange(
        self,
        method: str,
        path: str,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Answer:
        """One request as bytes."""
        connection = self._connection(timeout_s)
        try:
            sent = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, raw, sent)
            answer = connection.getresponse()
            body: Any = answer.read().decode()
            named = {name.lower(): value for name, value in answer.headers.items()}
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            body = json.loads(body)
        return Answer(answer.status, named, body)

    def request(
        self, method: str, path: str, body: Any = None, timeout_s: float = 60.0
    ) -> tuple[int, Any]:
        """(status, JSON or text)."""
        raw = None if body is None else json.dumps(body).encode()
        answer = self.exchange(method, path, raw, timeout_s=timeout_s)
        return answer.status, answer.body

    def stream(self, path: str, body: Any, timeout_s: float = 60.0) -> Iterator[Any]:
        """The `data:` lines of an SSE answer, parsed; the last one is the text `[DONE]` when it ended well."""
        connection = self._connection(timeout_s)
        try:
            raw = json.dumps({**body, "stream": True}).encode()
            connection.request("POST", path, raw, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise AssertionError(f"{answer.status}: {answer.read().decode()}")
            for line in answer:
                if line.startswith(b"data: "):
                    data = line[6:].strip().decode()
                    yield data if data == "[DONE]" else json.loads(data)
        finally:
            connection.close()

    def check_lives(self) -> None:
        """A process that ended is an error with its log."""
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}: {self.tail()}")

    def is_ready(self) -> bool:
        """Whether /ready says 200."""
        try:
            return self.request("GET", "/ready", timeout_s=5.0)[0] == 200
        except OSError:
            return False

    def listens(self) -> bool:
        """Whether its port takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        """All it has said, over all its lives."""
        return self.log_file.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The end of its log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def ledger(self) -> dict[str, Any]:
        """/debug/ledger."""
        status, body = self.request("GET", "/debug/ledger")
        assert status == 200, body
        assert isinstance(body, dict)
        return body

    def idle(self) -> bool:
        """An instance: no block in use, no grant, no request left."""
        ledger = self.ledger()
        return (
            ledger["free"] + ledger["cached"] == ledger["total"]
            and not ledger.get("kv_grants_open")  # only who takes handoffs has grants
            and ledger["requests_open"] == 0
            and ledger["outlets"] == 0
            and not ledger.get("unacknowledged")  # only who speaks to masters has these two
            and not ledger.get("relayed")
        )

    def processes(self) -> list[psutil.Process]:
        """The daemon and, of an instance, its engine."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children()]

    @contextlib.contextmanager
    def frozen(self, *, engine_too: bool) -> Iterator[None]:
        """Inside, the process is stopped but not dead: its ports take connections and nothing answers."""
        chosen = self.processes()[: None if engine_too else 1]
        try:
            for process in chosen:
                process.suspend()
            yield
        finally:
            for process in chosen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def kill(self) -> None:
        """SIGKILL to the daemon alone: its engine has to notice by itself."""
        every = self.processes()
        self.process.kill()
        self.process.wait()
        wait_for(
            f"the engine of {self.name} to die", lambda: not psutil.wait_procs(every, timeout=0)[1]
        )

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, wait, and the exit code; SIGKILL when it does not leave."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not stop: {self.tail()}") from None


@dataclass
class Cluster:
    """Registry inside the master (or a given etcd), one master, and instances."""

    folder: Path
    model: Path
    etcd_port: int = 0
    tls: ssl.SSLContext | None = None  # how to reach daemons that speak HTTPS
    daemons: list[Daemon] = field(default_factory=list)

    def start(
        self,
        name: str,
        program: str,
        *flags: str,
        port: int,
        env: dict[str, str] | None = None,
        under: tuple[str, ...] = (),
    ) -> Daemon:
        """Start one daemon without waiting. under: a program that becomes the one given behind its words."""
        command = [*under, sys.executable, "-m", f"xllm_py.{program}", *flags]
        daemon = Daemon(name, command, env or {}, port, self.folder / f"{name}.log", self.tls)
        self.daemons.append(daemon)
        return daemon

    def start_master(
        self, *flags: str, name: str = "master", env: dict[str, str] | None = None
    ) -> Daemon:
        """A master; it serves an embedded registry unless `etcd_port` was set."""
        embedded = not self.etcd_port
        self.etcd_port = self.etcd_port or free_port()
        port = free_port()
        return self.start(
            name,
            "cli.xllm_master",
            f"--etcd_addr=127.0.0.1:{self.etcd_port}",
            *(["--embedded_etcd=true"] if embedded else []),
            f"--http_server_port={port}",
            f"--rpc_server_port={free_port()}",
            f"--tokenizer_path={self.model}",
            "--debug_endpoints=true",
            *flags,
            port=port,
            env=env,
        )

    def start_registry(self) -> Daemon:
        """A registry of its own, in memory; started again it is empty and has the same port."""
        self.etcd_port = self.etcd_port or free_port()
        flags = [f"--listen-client-urls=http://127.0.0.1:{self.etcd_port}"]
        registry = self.start("registry", "registry.embedded", *flags, port=self.etcd_port)
        wait_for("the registry", registry.listens)
        return registry

    def start_instance(
        self,
        name: str,
        role: str,
        *flags: str,
        env: dict[str, str] | None = None,
        under: tuple[str, ...] = (),
    ) -> Daemon:
        """An instance of the cluster's model; role DEFAULT without registry when there is no etcd port. under: see `start`."""
        port = free_port()
        cluster = [f"--etcd_addr=127.0.0.1:{self.etcd_port}"] if self.etcd_port else []
        if role != "DEFAULT":
            cluster += [
                "--enable_disagg_pd=true",
                f"--instance_role={role}",
                f"--disagg_pd_port={free_port()}",
                f"--transfer_listen_port={free_port()}",
            ]
        return self.start(
            name,
            "cli.xllm",
            f"--model={self.model}",
            "--devices=cpu:0",
            "--cpu_threads=1",
            "--max_cache_size=67108864",
            f"--port={port}",
            "--debug_endpoints=true",
            "--kv_poison",
            *cluster,
            *flags,
            port=port,
            env=env,
            under=under,
        )

    def wait_ready(self, *daemons: Daemon) -> None:
        """Until /ready says 200 everywhere; all of the cluster must live meanwhile, they wait for each other."""

        def is_ready(daemon: Daemon) -> bool:
            for each in self.daemons:
                each.check_lives()
            return daemon.is_ready()

        for daemon in daemons or tuple(self.daemons):
            try:
                wait_for(
                    f"{daemon.name} ready",
                    lambda daemon=daemon: is_ready(daemon),
                    START_TIMEOUT_S,
                )
            except AssertionError as error:
                raise AssertionError(f"{error}\n{daemon.tail()}") from None

    def stop(self) -> None:
        """Stop in reverse order; a failing stop does not keep the others alive."""
        errors = []
        for daemon in reversed(self.daemons):
            try:
                daemon.stop()
            except AssertionError as error:
                errors.append(str(error))
        self.daemons.clear()
        if errors:
            raise AssertionError("\n".join(errors))


@contextlib.contextmanager
def running(folder: Path, model: Path) -> Iterator[Cluster]:
    """A cluster that is stopped at the end whatever happens."""
    cluster = Cluster(folder, model)
    try:
        yield cluster
    finally:
        cluster.stop()
