"""Starts real `xllm` and `xllm-master` processes on free loopback ports for a benchmark, and stops them by pid."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Daemon:
    """One process and its HTTP port."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        """Of its HTTP door."""
        return f"http://127.0.0.1:{self.port}"

    def says_200(self, path: str) -> bool:
        """Whether GET answers 200; a process that ended stops the benchmark with the end of its log."""
        if self.process.poll() is not None:
            raise SystemExit(f"{self.name} ended: {self.log_file.read_text()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait(self, path: str, every_s: float = 0.02) -> None:
        """Until GET answers 200."""
        deadline = time.perf_counter() + READY_TIMEOUT_S
        while not self.says_200(path):
            if time.perf_counter() > deadline:
                raise SystemExit(f"{self.name}: {path} was never 200: {self.log_file}")
            time.sleep(every_s)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when it does not leave."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Daemons:
    """Everything one benchmark started."""

    folder: Path  # for logs
    model: Path
    running: list[Daemon] = field(default_factory=list)
    etcd_port: int = 0

    def _start(
        self, name: str, program: str, port: int, flags: list[str], core: int | None = None
    ) -> Daemon:
        command = [sys.executable, "-m", *program.split(), *flags]
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        return self.start_other(name, command, port)

    def start_other(self, name: str, command: list[str], port: int) -> Daemon:
        """A program that is none of ours, with an HTTP port; returns at once."""
        log_file = self.folder / f"{name}-{len(self.running)}.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        daemon = Daemon(name, process, port, log_file)
        self.running.append(daemon)
        return daemon

    def start_master(self, *more: str) -> Daemon:
        """A master that serves the registry as well; returns at once."""
        port, self.etcd_port = free_port(), free_port()
        flags = [
            f"--etcd_addr=127.0.0.1:{self.etcd_port}",
            "--embedded_etcd=true",
            f"--http_server_port={port}",
            f"--rpc_server_port={free_port()}",
            f"--tokenizer_path={self.model}",
            *more,
        ]
        return self._start("master", "xllm_py.cli.xllm_master", port, flags)

    def start_instance(
        self,
        role: str,
        flags: list[str],
        *,
        core: int | None = None,
        member: bool | None = None,
        program: str = "xllm_py.cli.xllm",
    ) -> Daemon:
        """Returns at once. member: of the master's cluster; without: all but DEFAULT are. core: the only one it runs on."""
        port = free_port()
        given = [f"--model={self.model}", "--devices=cpu:0", f"--port={port}", *flags]
        split = role != "DEFAULT"
        if split if member is None else member:
            given += [
                f"--etcd_addr=127.0.0.1:{self.etcd_port}",
                f"--disagg_pd_port={free_port()}",
                f"--transfer_listen_port={free_port()}",
            ]
        if split:
            given += ["--enable_disagg_pd=true", f"--instance_role={role}"]
        return self._start(role.lower(), program, port, given, core)

    def stop(self, which: Callable[[Daemon], bool] = lambda daemon: True) -> None:
        """Stop in reverse order."""
        for daemon in reversed([each for each in self.running if which(each)]):
            daemon.stop()
            self.running.remove(daemon)


@contextlib.contextmanager
def daemons(folder: Path, model: Path) -> Iterator[Daemons]:
    """Stopped at the end whatever happens, SIGTERM included."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = Daemons(folder, model)
    try:
        yield started
    finally:
        started.stop()
