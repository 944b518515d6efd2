"""Two KV transports of one kind, the memories behind them, and how a test waits for what they tell."""

from __future__ import annotations

import random
import select
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tests.certificates import make_certificates
from xllm_py.base.clock import RealClock
from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, KvTransport, TakerGrant
from xllm_py.transport.fabric import Fabric, open_fabric
from xllm_py.transport.memory import MemoryKvTransport, MemoryNetwork
from xllm_py.transport.payload_ring import Memory
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.transport.tcp_tls import KvTls
from xllm_py.wire.codec import Payloads

LAYOUT = KvLayout(num_layers=3, block_size=4, block_bytes=96, shape="test")
NUM_BLOCKS = 32
KEY = b"k" * 32
DIGEST = b"d" * 16
CANARY = 0xC5
DEADLINE_S = 10.0

# engines for fabrics that are installed here; the fake stands for them where none is
_PACKAGES = {"nixl": "nixl_cu12", "mooncake": "mooncake"}
FABRICS = [name for name, package in _PACKAGES.items() if find_spec(package)]

Make = Callable[..., KvTransport]


def make_memory(
    seed: int | None, layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS
) -> KvMemory:
    """Random content, or canaries everywhere when seed is None."""
    size = num_blocks * layout.block_bytes
    source = random.Random(seed)
    regions = [
        memoryview(
            bytearray([CANARY]) * size if seed is None else bytearray(source.randbytes(size))
        )
        for _ in range(layout.num_layers * PARTS)
    ]
    return KvMemory(layout, num_blocks, regions)


def make_tcp(
    *,
    memory: KvMemory,
    incarnation: str,
    cluster_key: bytes = KEY,
    num_streams: int = 1,
    tls: KvTls | None = None,
    shared_memory: bool = False,
    fabric: Fabric | None = None,
) -> KvTransport:
    return TcpKvTransport(
        memory=memory,
        incarnation=incarnation,
        cluster_key=cluster_key,
        num_streams=num_streams,
        tls=tls,
        shared_memory=shared_memory,
        fabric=fabric,
    )


make_shared = partial(make_tcp, shared_memory=True)
make_streams = partial(make_tcp, num_streams=3)


def tls_maker() -> Make:
    with tempfile.TemporaryDirectory() as folder:
        tls = KvTls(make_certificates(Path(folder)))
    return partial(make_tcp, tls=tls)


def fabric_maker(name: str) -> Make:
    """Both sides use it."""
    if name == "in memory":
        return partial(make_tcp, fabric=FakeFabric())
    return partial(make_tcp, fabric=open_fabric(name, "127.0.0.1", RealClock()))


class FakeFabric:
    """One-sided writes within this process."""

    payloads = Payloads.NIXL

    def __init__(self) -> None:
        self.landings: dict[bytes, Memory] = {}
        self.broken = False  # whether writes fail

    def land(self, memory: Memory) -> FakeEnd:
        name = str(memory.address).encode()
        self.landings[name] = memory
        return FakeEnd(self, memory, name)

    def route(self, memory: Memory, description: bytes) -> FakeEnd:
        return FakeEnd(self, memory, description)


class FakeEnd:
    """A landing, or the route to one."""

    def __init__(self, fabric: FakeFabric, memory: Memory, name: bytes) -> None:
        self.description = name
        self._fabric, self._memory = fabric, memory

    def write(self, place: int, length: int) -> None:
        target = self._fabric.landings.get(self.description)
        if target is None or self._fabric.broken:
            raise LinkBroken("nobody lands there")
        target.view[place : place + length] = self._memory.view[place : place + length]

    def close(self) -> None:
        if self._fabric.landings.get(self.description) is self._memory:
            del self._fabric.landings[self.description]


def memory_maker() -> Make:
    network = MemoryNetwork(RealClock())

    def make(*, memory: KvMemory, incarnation: str, cluster_key: bytes = KEY) -> KvTransport:
        return MemoryKvTransport(
            network=network, memory=memory, incarnation=incarnation, cluster_key=cluster_key
        )

    return make


class Pair:
    """P gives, D takes. Blocks of D that no grant names hold canaries. pull: D fetches them."""

    def __init__(self, make: Make, *, pull: bool = False) -> None:
        self.make = make
        self.pull = pull
        self.giver_memory, self.taker_memory = make_memory(1), make_memory(None)
        self.giver = make(memory=self.giver_memory, incarnation="p-1")
        self.taker = make(memory=self.taker_memory, incarnation="d-1")
        self.extra: list[KvTransport] = []
        self.given: list[KvEvent] = []
        self.taken: list[KvEvent] = []
        self.num_streams = 1
        self._grants = 0
        self._streams: dict[bytes, int] = {}
        self.way = ""  # endpoint of a proxy before the side that listens

    def add(self, **made: object) -> KvTransport:
        """One more transport, closed with the pair."""
        self.extra.append(self.make(**made))
        return self.extra[-1]

    def grant(
        self,
        block_ids: tuple[int, ...],
        *,
        first_wanted: int = 0,
        peer: str = "p-1",
        digest: bytes = DIGEST,
    ) -> bytes:
        """D opens a grant."""
        self._grants += 1
        grant = self._grants.to_bytes(16, "big")
        self._streams[grant] = self.taker.open_grant(
            TakerGrant(
                grant=grant,
                peer_incarnation=peer,
                block_size=4,
                block_ids=block_ids,
                first_wanted=first_wanted,
                prompt_digest=digest,
                sources=((self.way or self.giver.endpoint),) if self.pull else (),
                read_grant=read_grant(grant) if self.pull else b"",
            )
        )
        return grant

    def connect(
        self,
        grant: bytes,
        *,
        giver: KvTransport | None = None,
        incarnation: str = "d-1",
        digest: bytes = DIGEST,
    ) -> None:
        """P learns of the grant."""
        (giver or self.giver).connect(
            GiverGrant(
                grant=grant,
                endpoints=() if self.pull else ((self.way or self.taker.endpoint),),
                peer_incarnation=incarnation,
                block_size=4,
                prompt_digest=digest,
                read_grant=read_grant(grant) if self.pull else b"",
                stream=self._streams.get(grant, 0),
            )
        )

    def push(self, grant: bytes, block_ids: tuple[int, ...], first: int = 0) -> None:
        """All layers of these blocks."""
        for layer in range(LAYOUT.num_layers):
            self.giver.push(grant, layer, first, block_ids)

    def give(self, grant: bytes, block_ids: tuple[int, ...], first: int = 0) -> None:
        """Connect, push, commit."""
        self.connect(grant)
        self.push(grant, block_ids, first)
        self.giver.commit(grant)

    def turn(self, wait_s: float = 0.0) -> None:
        """Take what both tell."""
        select.select([self.giver.wake_fd, self.taker.wake_fd], [], [], wait_s)
        self.given += self.giver.poll()
        self.taken += self.taker.poll()
        for transport in self.extra:
            self.given += transport.poll()

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition, with a deadline that says what was awaited."""
        deadline = time.monotonic() + DEADLINE_S
        self.turn()
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}: {self.given} {self.taken}")
            self.turn(0.02)

    def given_event(self, kind: KvEventKind, grant: bytes) -> KvEvent:
        """Wait for P's event."""
        self.until(f"P {kind}", lambda: bool(_find(self.given, kind, grant)))
        return _find(self.given, kind, grant)[0]

    def taken_event(self, kind: KvEventKind, grant: bytes) -> KvEvent:
        """Wait for D's event."""
        self.until(f"D {kind}", lambda: bool(_find(self.taken, kind, grant)))
        return _find(self.taken, kind, grant)[0]

    def assert_copied(self, sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
        """Every layer and part of these blocks is the same on both sides."""
        for source, target in zip(sources, targets, strict=True):
            for layer in range(LAYOUT.num_layers):
                for part in range(PARTS):
                    expected = self.giver_memory.span(layer, part, source)
                    assert self.taker_memory.span(layer, part, target) == expected

    def assert_untouched(self, but: tuple[int, ...] = ()) -> None:
        """Canaries live in every block of D except these."""
        whole = bytes([CANARY]) * LAYOUT.block_bytes
        for block in set(range(NUM_BLOCKS)) - set(but):
            for layer in range(LAYOUT.num_layers):
                for part in range(PARTS):
                    assert self.taker_memory.span(layer, part, block) == whole, block

    def wipe(self, blocks: tuple[int, ...]) -> None:
        """Canaries in these blocks of D again."""
        for block in blocks:
            for layer in range(LAYOUT.num_layers):
                for part in range(PARTS):
                    self.taker_memory.span(layer, part, block)[:] = (
                        bytes([CANARY]) * LAYOUT.block_bytes
                    )

    def close(self) -> None:
        """Everything."""
        for transport in [self.giver, self.taker, *self.extra]:
            transport.close()


def _find(events: list[KvEvent], kind: KvEventKind, grant: bytes) -> list[KvEvent]:
    return [event for event in events if event.kind is kind and event.grant == grant]


def read_grant(grant: bytes) -> bytes:
    """What P gives D for a grant of D's."""
    return bytes(255 - byte for byte in grant)
