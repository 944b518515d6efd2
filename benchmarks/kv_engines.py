"""What else moves memory from one process to another over loopback: iperf3, a plain socket loop, nixl and mooncake by themselves.

    python -m benchmarks.kv_engines [--rounds 5] [--mebibytes 240]

The engines write from registered memory into registered memory of a second process, contiguous pieces of 64 KiB to 16 MiB, and
scattered blocks by lists of descriptors, 4 MiB a call. They check nothing. Over TCP, unless UCX_TLS says else. One JSON line a row;
engines that are not installed are left out. benchmarks/kv_link has the KV link, against the same loop; --beside=shared (or another
way of it) measures the link and each engine's contiguous rows in turn, --rounds times, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from benchmarks.kv_link import PIECE_BYTES, SHAPES, WAYS, Giver, Shape, say
from benchmarks.report import emit, summary
from xllm_py.base import log

CALL_BYTES = 4 << 20
TURN_ROUNDS = 5
ENVIRONMENT = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "GLOG_minloglevel": "3"}
ROWS = [(f"{kib} KiB pieces", kib << 10, False) for kib in (64, 512, 1024, 4096, 16384)]
ROWS += [(f"{kib} KiB blocks, scattered", kib << 10, True) for kib in (32, 16, 4)]
Places = list[tuple[int, int, int]]  # from, to, bytes


class Engine(Protocol):
    """Either end."""

    def words(self) -> str:
        """For the other end."""
        ...

    def meet(self, words: str) -> None:
        """The other end's."""
        ...

    def write(self, places: Places) -> None:
        """All of them; there when it returns."""
        ...


class NixlEngine:
    """See Engine."""

    def __init__(self, name: str, address: int, size: int) -> None:
        with log.kept():
            from nixl_cu12._api import nixl_agent, nixl_agent_config
        self._agent: Any = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory([(address, size, 0, "")], "DRAM")
        self._peer = ""

    def words(self) -> str:
        words: bytes = self._agent.get_agent_metadata()
        return words.hex()

    def meet(self, words: str) -> None:
        self._peer = self._agent.add_remote_agent(bytes.fromhex(words)).decode()

    def write(self, places: Places) -> None:
        agent = self._agent
        here = agent.get_xfer_descs([(source, size, 0) for source, _, size in places], "DRAM")
        there = agent.get_xfer_descs([(target, size, 0) for _, target, size in places], "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, self._peer)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        agent.release_xfer_handle(handle)


class MooncakeEngine:
    """See Engine."""

    def __init__(self, _name: str, address: int, size: int) -> None:
        from mooncake.engine import TransferEngine

        self._engine: Any = TransferEngine()
        assert self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        assert self._engine.register_memory(address, size) == 0
        self._peer = ""

    def words(self) -> str:
        return f"127.0.0.1:{self._engine.get_rpc_port()}"

    def meet(self, words: str) -> None:
        self._peer = words

    def write(self, places: Places) -> None:
        columns = [list(column) for column in zip(*places, strict=True)]
        assert self._engine.batch_transfer_sync_write(self._peer, *columns) == 0


ENGINES: dict[str, tuple[str, Callable[[str, int, int], Engine]]] = {
    "nixl": ("nixl_cu12", NixlEngine),
    "mooncake": ("mooncake", MooncakeEngine),
}


def make(size: int) -> tuple[Any, int]:
    """Touched memory of this size, and its address."""
    import numpy as np

    memory = np.full(size, 0xA5, np.uint8)
    return memory, memory.ctypes.data


def take(engine: str, size: int) -> None:
    """The child."""
    memory, address = make(size)
    end = ENGINES[engine][1]("taker", address, size) if engine else None
    plain = socket.create_server(("127.0.0.1", 0))
    words = end.words() if end is not None else ""
    say(sys.stdout, words=words, address=address, port=plain.getsockname()[1])
    link, _ = plain.accept()
    view, left = memoryview(memory), size
    while chunk := link.recv_into(view[size - left : size - left + PIECE_BYTES]):
        left -= chunk
        if not left:
            link.sendall(b"!")
            left = size


@contextmanager
def other_process(engine: str, size: int) -> Iterator[dict[str, Any]]:
    """Where its memory is, and a socket to it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv_engines", "--serve", engine, "--bytes", str(size)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    line = next(line for line in child.stdout if line.startswith("{"))
    hello: dict[str, Any] = json.loads(line)
    with socket.create_connection(("127.0.0.1", hello["port"])) as sock:
        yield {**hello, "sock": sock}
    child.wait(10)


def places_of(size: int, piece: int, scattered: bool, source: int, target: int) -> list[Places]:
    """Call by call."""
    number = size // piece
    there = list(range(number))
    if scattered:
        random.Random(7).shuffle(there)
    pieces = [
        (source + index * piece, target + place * piece, piece) for index, place in enumerate(there)
    ]
    step = max(1, CALL_BYTES // piece)
    return [pieces[at : at + step] for at in range(0, number, step)]


def beside(engine: str, shape: Shape, turns: int) -> None:
    """The engine and our link in turn, each while the other does not exist (engines poll): the medians of a turn, and their ratio."""
    ours: list[float] = []
    theirs: dict[str, list[float]] = {}
    for _ in range(turns):
        command = [sys.executable, "-m", "benchmarks.kv_engines", "--only", engine]
        command += ["--mebibytes", str(shape.mebibytes), "--rounds", str(TURN_ROUNDS)]
        # no check: nixl may crash when its process ends, with all rows told
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for line in told.splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            if row.get("engine") == engine and "scattered" not in row["row"]:
                theirs.setdefault(row["row"], []).append(row["gb_s"]["median"])
        with closing(Giver(shape)) as giver:
            giver.run_link(check=True)
            ours.append(statistics.median(giver.run_link() for _ in range(TURN_ROUNDS)))
    for row, rates in theirs.items():
        emit(
            "kv_engines",
            {"engine": engine, "row": row, "beside": f"{shape.way}, {shape.name}"},
            {
                "gb_s": summary(rates),
                "our_gb_s": summary(ours),
                "ours_to_theirs": summary([a / b for a, b in zip(ours, rates, strict=True)]),
            },
        )


def run_plain(memory: Any, sock: socket.socket, size: int) -> float:
    """GB/s."""
    view, start = memoryview(memory), time.perf_counter()
    for at in range(0, size, PIECE_BYTES):
        sock.sendall(view[at : at + PIECE_BYTES])
    assert sock.recv(1) == b"!"
    return size / (time.perf_counter() - start) / 1e9


def measure(engine: str, size: int, rounds: int) -> None:
    """Rows of one engine, each in turn with the plain loop."""
    memory, address = make(size)
    end = ENGINES[engine][1]("giver", address, size)
    with other_process(engine, size) as other:
        end.meet(other["words"])
        for name, piece, scattered in ROWS:
            calls = places_of(size, piece, scattered, address, other["address"])
            run_plain(memory, other["sock"], size)
            rates, plain = [], []
            for turn in range(rounds + 1):
                start = time.perf_counter()
                for places in calls:
                    end.write(places)
                if turn:  # the first one connects
                    rates.append(size / (time.perf_counter() - start) / 1e9)
                    plain.append(run_plain(memory, other["sock"], size))
            share = statistics.median(a / b for a, b in zip(rates, plain, strict=True))
            emit(
                "kv_engines",
                {"engine": engine, "row": name, "mebibytes": size >> 20},
                {
                    "gb_s": summary(rates),
                    "plain_gb_s": summary(plain),
                    "share_of_plain": round(share, 3),
                },
            )


def measure_iperf(rounds: int) -> None:
    """One stream over loopback; its server lives for one test."""
    rates = []
    for _ in range(rounds):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        command = ["iperf3", "-s", "-1", "-p", port, "--forceflush"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            next(line for line in server.stdout if "listening" in line)
            said = subprocess.run(
                ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", "2", "-l", "1M", "-J"],
                capture_output=True,
                text=True,
                check=True,
            )
            server.communicate(timeout=10)
        rates.append(json.loads(said.stdout)["end"]["sum_received"]["bits_per_second"] / 8e9)
    emit("kv_engines", {"engine": "iperf3", "row": "1 MiB pieces"}, {"gb_s": summary(rates)})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=240)
    parser.add_argument("--beside", default="", choices=WAYS)
    parser.add_argument("--shapes", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--only", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        take(options.serve, options.bytes)
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    there = [name for name in options.only if importlib.util.find_spec(ENGINES[name][0])]
    if options.beside:
        for engine, index in itertools.product(there, options.shapes):
            shape = replace(SHAPES[index], mebibytes=options.mebibytes, way=options.beside)
            beside(engine, shape, options.rounds)
        return
    if shutil.which("iperf3") and options.only == list(ENGINES):
        measure_iperf(options.rounds)
    for engine in there:
        measure(engine, options.mebibytes << 20, options.rounds)


if __name__ == "__main__":
    main()
