"""Brings the ranks of one instance together, and ends all of them when one ends.

    rank 0 of the instance    the engine that the API process speaks to; plans, and samples
    place 0 of another node   started by that node's `xllm`, which has no door
    other places              started by place 0 of their node, die with it, and inherit the memory of their cache

All meet in one store at rank 0, tell what they are (version, model, flags that must agree), and go on only if that fits: what does not is one line on every
node. A lifeline from each to rank 0 tells within milliseconds that a process is gone; then all end with exit code 7, and a supervisor starts the instance anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from xllm_py import __version__
from xllm_py.base import log
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import DeviceUnavailable, EngineDied, StartError, UsageError
from xllm_py.base.process import interface_towards
from xllm_py.core.config import EngineConfig
from xllm_py.engine import lifeline
from xllm_py.transport.pipe import BlockingPipe, RankPipe
from xllm_py.transport.rank_line import RankLine, servant_pipe
from xllm_py.wire import messages as m

_LOOPBACK = "127.0.0.1"
_LAST_WORD_S = 2.0
_WORD_OF_RANK_0 = "verdict"
_KV_LINES = "kv lines"
_KV_LINE_S = 10.0
_INCARNATION = "incarnation"

_log = log.get(__name__)

OnLost = Callable[[StartError], None]  # ends the process; called in a thread


def end_process(error: StartError) -> None:
    """An OnLost for who has nobody to tell."""
    _log.error("engine ends", reason=error.message)
    os._exit(error.exit_code)


class RankGroup:
    """This process's place in it. `gather` once, `close` at the end."""

    def __init__(self, config: EngineConfig, on_lost: OnLost) -> None:
        self._config = config
        self._on_lost = on_lost
        self._closing = False
        self._lost = threading.Event()  # somebody is gone, and it is being said
        self._lines: lifeline.Lifelines | None = None
        self._line: socket.socket | None = None
        self._siblings: dict[int, tuple[subprocess.Popen[bytes], RankPipe]] = {}
        self._kv_listener: socket.socket | None = None
        self.store: Store | None = None

    def kv_lines(self) -> list[RankLine]:
        """Rank 0: to the KV transport of each other rank, in their order. Raises DeviceUnavailable when one does not come."""
        listener, lines = self._kv_listener, list[RankLine]()
        if listener is None:
            return lines
        listener.settimeout(self._config.ranks.patience_s)
        try:
            while len(lines) < self._config.num_ranks - 1:
                line = RankLine(listener.accept()[0], RealClock())
                lines.append(line)
        except OSError as error:
            raise DeviceUnavailable(
                f"only {len(lines)} of {self._config.num_ranks - 1} other ranks opened their KV ports in {self._config.ranks.patience_s:g} s"
            ) from error
        finally:
            listener.close()
        return sorted(lines, key=lambda line: line.rank)

    def incarnation(self) -> str:
        """Of the instance, which peers know all its ranks by."""
        return self._met().get(_INCARNATION).decode()

    def _met(self) -> Store:
        if self.store is None:
            raise DeviceUnavailable(f"rank {self._config.rank} has not met the others")
        return self.store

    def kv_line(self) -> BlockingPipe:
        """Another rank: to rank 0. Raises DeviceUnavailable."""
        there, _, port = self._met().get(_KV_LINES).decode().rpartition(":")
        try:
            return servant_pipe(socket.create_connection((there, int(port)), _KV_LINE_S))
        except OSError as error:
            raise DeviceUnavailable(
                f"rank {self._config.rank} cannot reach rank 0 at {there}:{port} ({error}); is that address open between the nodes?"
            ) from error

    def end(self, cause: Exception) -> None:
        """A step failed here in its middle, so the ranks are at different places and all end; most often because one of them is gone, which is better said.

        Does not return before the process ends: nobody is to hear of the step.
        """
        if self._lost.wait(_LAST_WORD_S):
            threading.Event().wait(2 * _LAST_WORD_S)  # the thread that says so ends the process
        else:
            self._closing = True
            first_line = str(cause).partition("\n")[0]
            self._on_lost(EngineDied(f"a step of several ranks failed: {first_line}"))

    def gather(self, facts: dict[str, str]) -> Store:
        """Meet the others; facts: what must agree. Raises DeviceUnavailable naming who is missing, UsageError saying what differs."""
        config = self._config
        host, port = _where(config)
        patience = timedelta(seconds=config.ranks.patience_s)
        if interface := interface_towards(host, port):
            # gloo else takes the one of the host's name; the others look for one only where there are several nodes
            libraries = ("GLOO", "NCCL", "HCCL") if config.ranks.nnodes > 1 else ("GLOO",)
            for library in libraries:
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
        try:
            store = self.store = TCPStore(
                host, port, config.num_ranks, config.rank == 0, patience, wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise DeviceUnavailable(self._not_met(host, port, error)) from error
        if config.ranks.place == 0:
            self._start_siblings(host, store.port)
        if config.rank == 0:
            self._lines = lifeline.Lifelines(host, self._on_rank_lost)
            store.set("lifeline", f"{host}:{self._lines.port}")
            if config.kv_listen:
                self._kv_listener = socket.create_server((host, 0))
                store.set(_KV_LINES, f"{host}:{self._kv_listener.getsockname()[1]}")
                store.set(_INCARNATION, config.incarnation)
        else:
            there, _, at = store.get("lifeline").decode().rpartition(":")
            self._line = lifeline.hold((there, int(at)), config.rank, self._on_lead_lost)
        self._agree(store, {"version": __version__, **facts})
        return store

    def _not_met(self, host: str, port: int, error: Exception) -> str:
        config = self._config
        if config.rank == 0:
            cause = str(error).strip().partition("\n")[0]
            return f"the ranks cannot gather at {host}:{port} ({cause}); pass another --master_node_addr"
        return f"rank {config.rank} of {config.num_ranks} found nobody at {host}:{port} in {config.ranks.patience_s:g} s; is node 0 started, with the same --master_node_addr?"

    def _start_siblings(self, host: str, port: int) -> None:
        """The other ranks of this node, which die with this process."""
        config = self._config
        for place in range(1, len(config.devices)):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "xllm_py.engine", "--fd", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
            pipe = RankPipe(ours)
            ranks = dataclasses.replace(config.ranks, place=place, address=f"{host}:{port}")
            pipe.send(m.Start(config=dataclasses.replace(config, ranks=ranks)))
            rank = config.rank + place
            self._siblings[rank] = (process, pipe)
            watch = threading.Thread(
                target=self._watch, args=(rank,), name=f"rank {rank}", daemon=True
            )
            watch.start()

    def _watch(self, rank: int) -> None:
        """Until a sibling ends."""
        process, _ = self._siblings[rank]
        process.wait()
        self._on_rank_lost(rank)

    def _on_rank_lost(self, rank: int) -> None:
        if self._closing:
            return
        self._closing = True
        self._lost.set()
        config = self._config
        name = f"rank {rank} ({config.devices[rank % len(config.devices)]} of node {rank // len(config.devices)})"
        if rank not in self._siblings:
            self._on_lost(EngineDied(f"{name} is gone; its node's log says why"))
            return
        process, pipe = self._siblings[rank]
        said = pipe.last_word(_LAST_WORD_S)
        if isinstance(said, m.Failed):
            self._on_lost(_as_error(said))
            return
        try:
            code = process.wait(_LAST_WORD_S)
        except subprocess.TimeoutExpired:
            self._on_lost(EngineDied(f"{name} closed its connection"))
            return
        self._on_lost(EngineDied(f"{name} ended with exit code {code}"))

    def _on_lead_lost(self) -> None:
        if not self._closing:
            self._closing = True
            self._lost.set()
            self._on_lost(EngineDied("rank 0 is gone, so its other ranks end"))

    # ---- do they fit?

    def _agree(self, store: Store, facts: dict[str, str]) -> None:
        config = self._config
        store.set(f"facts {config.rank}", json.dumps(facts))
        if config.rank != 0:
            store.wait([_WORD_OF_RANK_0], timedelta(seconds=2 * config.ranks.patience_s))
            self._obey(store.get(_WORD_OF_RANK_0).decode())
            return
        try:
            verdict = self._compared(store, facts)
        except DeviceUnavailable as error:
            self._closing = True
            store.set(_WORD_OF_RANK_0, error.message)
            raise
        store.set(_WORD_OF_RANK_0, verdict)
        self._obey(verdict)

    def _compared(self, store: Store, mine: dict[str, str]) -> str:
        """What differs, empty when nothing does. Raises DeviceUnavailable when somebody does not come."""
        config, clock = self._config, RealClock()
        deadline = clock.now() + config.ranks.patience_s
        for rank in range(1, config.num_ranks):
            left_s = max(0.1, deadline - clock.now())
            try:
                store.wait([f"facts {rank}"], timedelta(seconds=left_s))
            except RuntimeError as error:
                host, port = _where(config)
                raise DeviceUnavailable(
                    f"rank {rank} of {config.num_ranks} (node {rank // len(config.devices)}) did not come to {host}:{port} in "
                    f"{config.ranks.patience_s:g} s; is its node started, with the same --nnodes and --master_node_addr?"
                ) from error
            theirs = json.loads(store.get(f"facts {rank}"))
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    return (
                        f"{name} differs: {mine.get(name)} on rank 0, {theirs.get(name)} on rank {rank} (node "
                        f"{rank // len(config.devices)}); start all nodes with the same model and flags"
                    )
        return ""

    def _obey(self, verdict: str) -> None:
        if verdict:
            self._closing = True  # everybody ends, and that is no loss
            raise UsageError(verdict)

    def close(self) -> None:
        """Let go of the others: they end as well."""
        self._closing = True
        if self._lines is not None:
            self._lines.close()
        if self._line is not None:
            self._line.close()
        for process, _ in self._siblings.values():
            try:
                process.wait(_LAST_WORD_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _where(config: EngineConfig) -> tuple[str, int]:
    """Where all meet."""
    if not config.ranks.address:
        return _LOOPBACK, 0
    host, _, port = config.ranks.address.rpartition(":")
    return host.strip("[]"), int(port)


def _as_error(said: m.Failed) -> StartError:
    """As the rank said it, under the exit code it ended with."""
    leaves = {leaf.exit_code: leaf for leaf in StartError.__subclasses__()}
    return leaves.get(said.exit_code, EngineDied)(said.message)
