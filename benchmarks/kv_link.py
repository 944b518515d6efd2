"""How fast is the KV link over loopback, against a plain socket loop in the same run?

    python -m benchmarks.kv_link [--rounds 7] [--mebibytes 240] [--ways tcp shared ...] [--shapes 0 2 ...] [--frames 512 ...]

--frames: KiB that a giver fills a frame to, at most 4096; 0, as the link does it. "no digest" leaves the checksums out, which the link itself never does.
nixl and mooncake are measured when they are installed; benchmarks/kv_engines measures them without our link around them.
Giver and taker are two processes. Each round moves the same number of bytes once through a plain sendall / recv_into loop and
once through grants, frames, checksums and COMMIT, in turns; both read from and write to memory of that whole size, so caches
do not help. The content is compared before anything is timed. One JSON line per row.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import trustme

from benchmarks.report import emit, summary
from xllm_py.base.clock import RealClock
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.core.service_config import TlsSlice
from xllm_py.device.cpu.native.build import build, instruction_sets
from xllm_py.device.cpu.native.library import Library
from xllm_py.transport import kv_giving, stage, tcp_taker
from xllm_py.transport.base import GiverGrant, KvEventKind, TakerGrant
from xllm_py.transport.fabric import open_fabric
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire import codec

KEY = b"benchmark key of some length 32."
DIGEST = bytes(16)
PIECE_BYTES = 1 << 20
DEADLINE_S = 60.0
PACKAGES = {"nixl": "nixl_cu12", "mooncake": "mooncake"}
FABRICS = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
WAYS = ("tcp", "pull", "no digest", "2 streams", "4 streams", "tls", "shared", *FABRICS)


@dataclass(frozen=True)
class Shape:
    """One row: how the cache is cut and how blocks lie in it."""

    name: str
    num_layers: int
    block_tokens: int
    block_bytes: int
    prompt_blocks: int  # of one grant
    scattered: bool
    mebibytes: int = 240
    way: str = "tcp"
    folder: str = ""  # of the certificates
    frame_kib: int = 0  # the link's own

    @property
    def layout(self) -> KvLayout:
        return KvLayout(
            num_layers=self.num_layers,
            block_size=self.block_tokens,
            block_bytes=self.block_bytes,
            shape=self.name,
        )

    def transport(self, memory: KvMemory, incarnation: str, listen: bool) -> TcpKvTransport:
        """One end, as `way` says."""
        if self.frame_kib:
            codec.FRAME_BYTES = codec.BESIDE_BYTES = self.frame_kib << 10
        digest = payload_checksum if self.way != "no digest" else lambda *_views: 0
        for module in (stage, tcp_taker, kv_giving):
            module.payload_checksum = digest
        return TcpKvTransport(
            memory=memory,
            incarnation=incarnation,
            cluster_key=KEY,
            listen=listen,
            num_streams={"2 streams": 2, "4 streams": 4}.get(self.way, 1),
            tls=self.tls() if self.way == "tls" else None,
            shared_memory=self.way == "shared",
            fabric=open_fabric(self.way, "127.0.0.1", RealClock()) if self.way in FABRICS else None,
        )

    def tls(self) -> KvTls:
        """Of both ends."""
        files = [f"{self.folder}/{name}" for name in ("cert.pem", "key.pem", "ca.pem")]
        return KvTls(TlsSlice(cert_file=files[0], key_file=files[1], ca_file=files[2]))

    @property
    def num_grants(self) -> int:
        per_grant = self.num_layers * PARTS * self.block_bytes * self.prompt_blocks
        return max(1, (self.mebibytes << 20) // per_grant)

    @property
    def num_blocks(self) -> int:
        return self.num_grants * self.prompt_blocks

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes * self.num_layers * PARTS

    def grants(self, seed: int) -> list[tuple[int, ...]]:
        """The block ids of each grant."""
        blocks = list(range(self.num_blocks))
        if self.scattered:
            random.Random(seed).shuffle(blocks)
        size = self.prompt_blocks
        return [tuple(blocks[i : i + size]) for i in range(0, len(blocks), size)]


# Qwen2-0.5B: 24 layers, 2 KV heads of 64, bf16: 256 bytes a token, layer and part
SHAPES = [
    Shape("0.5B, 128-token blocks, prompt 2048", 24, 128, 32 << 10, 16, False),
    Shape("0.5B, 128-token blocks, prompt 2048, scattered", 24, 128, 32 << 10, 16, True),
    Shape("0.5B, 16-token blocks, prompt 2048, scattered", 24, 16, 4 << 10, 128, True),
    Shape("0.5B, 128-token blocks, prompt 512", 24, 128, 32 << 10, 4, False),
    Shape("7B, 128-token blocks, prompt 2048", 28, 128, 128 << 10, 16, False),
    Shape("0.5B, 64-token blocks, prompt 2048, scattered", 24, 64, 16 << 10, 32, True),
]


def make_memory(shape: Shape, fill: bool) -> tuple[KvMemory, list[memoryview]]:
    """Content that differs everywhere, or poison."""
    size = shape.num_blocks * shape.block_bytes
    regions = []
    for index in range(shape.num_layers * PARTS):
        region = bytearray(b"\xa5") * size
        if fill:
            region[:] = random.Random(index).randbytes(size)
        regions.append(memoryview(region))
    native = build(instruction_sets()[0])  # as the cpu device does
    return KvMemory(shape.layout, shape.num_blocks, regions, carrier=Library(native, "")), regions


def content(memory: KvMemory, shape: Shape, grants: list[tuple[int, ...]]) -> int:
    """A checksum over all grants in relative order."""
    crc = 0
    for block_ids in grants:
        for layer in range(shape.num_layers):
            for part in range(PARTS):
                for view in memory.spans(layer, part, block_ids):
                    crc = zlib.crc32(view, crc)
    return crc


def grant_name(number: int, index: int) -> bytes:
    return number.to_bytes(8, "big") + index.to_bytes(8, "big")


def pieces(regions: list[memoryview]) -> list[memoryview]:
    return [
        region[i : i + PIECE_BYTES]
        for region in regions
        for i in range(0, region.nbytes, PIECE_BYTES)
    ]


def say(pipe: IO[str], **message: Any) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def take(shape: Shape) -> None:
    """The child: the taker of both."""
    memory, regions = make_memory(shape, fill=False)
    transport = shape.transport(memory, "taker", listen=True)
    plain = socket.create_server(("127.0.0.1", 0))
    say(sys.stdout, kv=transport.endpoint, plain=plain.getsockname()[1])
    link, _ = plain.accept()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    grants = shape.grants(seed=2)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "plain":
            say(sys.stdout, ready=True)
            for piece in pieces(regions):
                view = piece
                while view:
                    view = view[link.recv_into(view) :]
            link.sendall(b"!")
        elif order["do"] == "cpu":
            say(sys.stdout, seconds=time.process_time())
        elif order["do"] == "open":
            for index, block_ids in enumerate(grants):
                transport.open_grant(
                    TakerGrant(
                        grant=grant_name(order["number"], index),
                        peer_incarnation="giver",
                        block_size=shape.block_tokens,
                        block_ids=block_ids,
                        first_wanted=0,
                        prompt_digest=DIGEST,
                        sources=(order["source"],) if order["source"] else (),
                        read_grant=grant_name(order["number"], index) if order["source"] else b"",
                    )
                )
            say(sys.stdout, ready=True)
        elif order["do"] == "close":
            for index in range(len(grants)):
                transport.revoke(grant_name(order["number"], index))
            say(sys.stdout, content=content(memory, shape, grants) if order["check"] else 0)
    transport.close()


class Giver:
    """The parent's side of one row."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.memory, self.regions = make_memory(shape, fill=True)
        self.grants = shape.grants(seed=1)
        arguments = ["-m", "benchmarks.kv_link", "--serve", json.dumps(asdict(shape))]
        self.child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self.hear()
        self.endpoint = hello["kv"]
        self.plain = socket.create_connection(("127.0.0.1", hello["plain"]))
        self.plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.transport = shape.transport(self.memory, "giver", listen=shape.way == "pull")
        self.number = 0

    def hear(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        message: dict[str, Any] = json.loads(self.child.stdout.readline())
        return message

    def order(self, **message: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        say(self.child.stdin, **message)
        return self.hear()

    def cpu_s(self) -> float:
        """CPU seconds of both processes so far."""
        theirs: float = self.order(do="cpu")["seconds"]
        return time.process_time() + theirs

    def run_plain(self) -> float:
        """GB/s."""
        self.order(do="plain")
        parts = pieces(self.regions)
        start = time.perf_counter()
        for part in parts:
            self.plain.sendall(part)
        assert self.plain.recv(1) == b"!"
        return self.shape.num_bytes / (time.perf_counter() - start) / 1e9

    def run_link(self, check: bool = False) -> float:
        """GB/s, from the first push to the last acknowledgement."""
        self.number += 1
        self.order(do="open", number=self.number, source=self.transport.endpoint)
        start = time.perf_counter()
        for index, block_ids in enumerate(self.grants):
            grant = grant_name(self.number, index)
            self.transport.connect(
                GiverGrant(
                    grant=grant,
                    endpoints=() if self.transport.endpoint else (self.endpoint,),
                    peer_incarnation="taker",
                    block_size=self.shape.block_tokens,
                    prompt_digest=DIGEST,
                    read_grant=grant if self.transport.endpoint else b"",
                )
            )
            for layer in range(self.shape.num_layers):
                self.transport.push(grant, layer, 0, block_ids)
            self.transport.commit(grant)
        self.wait_for_all()
        rate = self.shape.num_bytes / (time.perf_counter() - start) / 1e9
        theirs = self.order(do="close", number=self.number, check=check)["content"]
        if check and theirs != content(self.memory, self.shape, self.grants):
            raise SystemExit("what arrived is not what was sent")
        return rate

    def wait_for_all(self) -> None:
        missing = len(self.grants)
        while missing:
            readable, _, _ = select.select([self.transport.wake_fd], [], [], DEADLINE_S)
            if not readable:
                raise SystemExit("no acknowledgement in time")
            for event in self.transport.poll():
                if event.kind is not KvEventKind.ACKNOWLEDGED:
                    raise SystemExit(f"the link failed: {event.text}")
                missing -= 1

    def close(self) -> None:
        assert self.child.stdin is not None
        self.transport.close()
        self.plain.close()
        self.child.stdin.close()
        self.child.wait(10)


def measure(shape: Shape, rounds: int) -> None:
    """One row; scattered blocks beside the same ones in order, round by round."""
    with contextlib.ExitStack() as stack:
        giver = stack.enter_context(contextlib.closing(Giver(shape)))
        giver.run_plain()
        giver.run_link(check=True)
        in_order = None
        if shape.scattered:
            in_order = stack.enter_context(
                contextlib.closing(Giver(replace(shape, scattered=False)))
            )
            in_order.run_link()
        plain, link, of_order, plain_cpu, link_cpu = [], [], [], [], []
        for _ in range(rounds):
            start = giver.cpu_s()
            plain.append(giver.run_plain())
            middle = giver.cpu_s()
            link.append(giver.run_link())
            plain_cpu.append((middle - start) / shape.num_bytes * 1e9)
            link_cpu.append((giver.cpu_s() - middle) / shape.num_bytes * 1e9)
            if in_order is not None:
                of_order.append(link[-1] / in_order.run_link())
    share = [ours / theirs for ours, theirs in zip(link, plain, strict=True)]
    emit(
        "kv_link",
        {
            "row": shape.name,
            "way": shape.way,
            "frame_kib": shape.frame_kib,
            "mebibytes": shape.num_bytes >> 20,
            "grants": shape.num_grants,
        },
        {
            "link_gb_s": summary(link),
            "plain_gb_s": summary(plain),
            "share_of_plain": round(statistics.median(share), 3),
            **({"share_of_contiguous": summary(of_order)} if of_order else {}),
            "link_cpu_s_per_gb": round(statistics.median(link_cpu), 3),
            "plain_cpu_s_per_gb": round(statistics.median(plain_cpu), 3),
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=240)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--frames", nargs="+", type=int, default=[0])
    parser.add_argument("--shapes", nargs="+", type=int, default=list(range(len(SHAPES))))
    options = parser.parse_args()
    if options.serve:
        take(Shape(**json.loads(options.serve)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(folder)
        for index in options.shapes:
            for way, frame_kib in itertools.product(options.ways, options.frames):
                shape = replace(SHAPES[index], mebibytes=options.mebibytes, way=way, folder=folder)
                measure(replace(shape, frame_kib=frame_kib), options.rounds)


def make_certificates(folder: str) -> None:
    """An authority and one certificate for both ends."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(f"{folder}/ca.pem")
    leaf.private_key_pem.write_to_path(f"{folder}/key.pem")
    leaf.cert_chain_pems[0].write_to_path(f"{folder}/cert.pem")


if __name__ == "__main__":
    main()
