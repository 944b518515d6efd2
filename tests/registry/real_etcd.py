"""A real etcd on free loopback ports, started and stopped by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.ports import free_port


class RealEtcd:
    """One member with its data folder."""

    def __init__(self, folder: Path, *extra: str, scheme: str = "http") -> None:
        self._folder = folder
        self._extra = extra
        self._scheme = scheme
        self.port, self._peer = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it listens."""
        client, peer = f"{self._scheme}://{self.address}", f"http://127.0.0.1:{self._peer}"
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("ETCD_")
        }
        self._process = subprocess.Popen(
            [
                shutil.which("etcd") or "etcd",
                f"--data-dir={self._folder}/data",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                *self._extra,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        deadline = time.monotonic() + 20
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1),
            ):
                return
            if time.monotonic() > deadline:
                raise AssertionError("waited 20 s for etcd")
            time.sleep(0.05)

    def freeze(self) -> None:
        """Stop all its threads; returns when they stand still."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 and reap."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Forget everything; it must not run."""
        shutil.rmtree(self._folder / "data")

    def ctl(self, *words: str, may_fail: bool = False) -> str:
        """What etcdctl says."""
        run = subprocess.run(
            ["etcdctl", f"--endpoints={self.address}", *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "ETCDCTL_API": "3"},
        )
        assert may_fail or not run.returncode, run.stderr
        return run.stdout


@contextlib.contextmanager
def real_etcd(folder: Path, *extra: str, scheme: str = "http") -> Iterator[RealEtcd]:
    """A running etcd."""
    etcd = RealEtcd(folder, *extra, scheme=scheme)
    etcd.start()
    try:
        yield etcd
    finally:
        etcd.thaw()
        etcd.kill()
