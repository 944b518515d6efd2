"""A KV transport over several ranks: grants are parted, and what became of the parts is told as one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import pytest

from tests.transport.test_tcp_ranks import (
    D_BLOCKS,
    D_SIZE,
    DIGEST,
    HEADS,
    LAYERS,
    P_BLOCKS,
    P_SIZE,
    SOURCES,
    TARGETS,
    Rank,
    shares,
)
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import EngineDied, InternalError
from xllm_py.core.kv_memory import POISON, KvMemory, in_pieces
from xllm_py.core.kv_plan import HeadRoute, heads_of
from xllm_py.transport import rank_servant
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.rank_line import Push, RankLine, servant_pipe
from xllm_py.transport.rank_servant import Progress, RankServant
from xllm_py.transport.ranked import RankedTransport, part_name

ACKNOWLEDGED, LANDED = KvEventKind.ACKNOWLEDGED, KvEventKind.LANDED
FAILED, RELEASED = KvEventKind.FAILED, KvEventKind.RELEASED
GRANT, READ_GRANT = b"g" * 16, b"r" * 16


def wait(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Instance:
    """Some ranks: the first one's view of them all, the others served in threads."""

    def __init__(self, name: str, count: int, block_size: int, num_blocks: int) -> None:
        self.ranks = [Rank(share, block_size, num_blocks, name) for share in shares(count)]
        ports = [rank.open() for rank in self.ranks]
        self.progress = [Progress() for _ in self.ranks]
        self.endpoints = tuple(port.endpoint for port in ports)
        self.events: list[KvEvent] = []
        self.pipes: list[socket.socket] = []
        lines = []
        for rank in range(1, count):
            ours, theirs = socket.socketpair()
            servant = RankServant(
                line=servant_pipe(theirs),
                transport=ports[rank],
                memory=self.memory(ports[rank]),
                progress=self.progress[rank],
            )
            servant.start(rank, self.endpoints[rank])
            lines.append(RankLine(ours, RealClock()))
            self.pipes.append(theirs)
        assert [(line.rank, line.endpoint) for line in lines] == list(enumerate(self.endpoints))[1:]
        self.transport = RankedTransport(
            ports[0],
            self.memory(ports[0]),
            lines,
            share=self.ranks[0].share,
            streams=range(1),
        )

    def memory(self, port: object) -> KvMemory:
        found = port._memory  # type: ignore[attr-defined]
        assert isinstance(found, KvMemory)
        return found

    def begin_step(self) -> None:
        for line in self.transport._lines:
            line.step += 1
        for progress in self.progress:
            progress.begin()

    def stored(self, layer: int) -> None:
        for progress in self.progress:
            progress.stored(layer)

    def poll(self) -> list[KvEvent]:
        self.events += self.transport.poll()
        return self.events

    def event(self, kind: KvEventKind, grant: bytes = GRANT) -> KvEvent:
        def found() -> list[KvEvent]:
            return [e for e in self.poll() if (e.kind, e.grant) == (kind, grant)]

        wait(f"{kind}: {self.events}", lambda: bool(found()))
        time.sleep(0.05)
        (event,) = found()  # and only once
        return event

    def close(self) -> None:
        self.transport.close()


@dataclass
class Two:
    p: Instance
    d: Instance
    pull: bool

    def open(self) -> None:
        stream = self.d.transport.open_grant(
            TakerGrant(
                grant=GRANT,
                peer_incarnation="p",
                block_size=D_SIZE,
                block_ids=TARGETS,
                first_wanted=0,
                prompt_digest=DIGEST,
                sources=self.p.endpoints if self.pull else (),
                read_grant=READ_GRANT if self.pull else b"",
                peer_ranks=len(self.p.ranks),
            )
        )
        self.p.transport.connect(
            GiverGrant(
                grant=GRANT,
                endpoints=self.d.endpoints,
                peer_incarnation="d",
                block_size=D_SIZE,
                prompt_digest=DIGEST,
                read_grant=READ_GRANT if self.pull else b"",
                stream=stream,
                peer_ranks=len(self.d.ranks),
            )
        )

    def push(self, layer: int) -> None:
        self.p.transport.push(GRANT, layer, 0, in_pieces(SOURCES, P_SIZE // D_SIZE))

    def give(self) -> None:
        self.p.begin_step()
        for layer in range(LAYERS):
            self.p.stored(layer)
            self.push(layer)
        self.p.transport.commit(GRANT)

    def assert_copied(self) -> None:
        """All heads of all tokens, put together from the ranks of each side."""
        for index in range(2 * LAYERS):
            given = whole(self.p, index)[list(SOURCES)]
            taken = whole(self.d, index)[list(TARGETS)]
            assert np.array_equal(taken.reshape(given.shape), given)


def whole(instance: Instance, index: int) -> np.ndarray:
    """[blocks, tokens, heads, bytes] of one layer and part."""
    first = instance.ranks[0].cache[index]
    found = np.zeros((*first.shape[:2], HEADS, first.shape[3]), np.uint8)
    for rank in instance.ranks:
        mine = heads_of(rank.share.rank, rank.share.num_ranks, HEADS)
        found[:, :, mine.start : mine.stop] = rank.cache[index]
    return found


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    p_ranks, d_ranks, pull = request.param
    with ExitStack() as stack:
        p = stack.enter_context(closing(Instance("p", p_ranks, P_SIZE, P_BLOCKS)))
        d = stack.enter_context(closing(Instance("d", d_ranks, D_SIZE, D_BLOCKS)))
        source = np.random.default_rng(1)
        for rank in p.ranks:
            for cache in rank.cache:
                cache[:] = source.integers(0, 256, cache.shape, np.uint8)
        yield Two(p, d, pull)


PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]
EACH_WAY = [(*pair, pull) for pair in PAIRS for pull in (False, True)]


@pytest.mark.parametrize("two", EACH_WAY, indirect=True, ids=str)
def test_a_grant_lands_when_all_its_parts_have(two: Two) -> None:
    two.open()
    two.give()
    acknowledged, landed = two.p.event(ACKNOWLEDGED), two.d.event(LANDED)
    size = len(TARGETS) * D_SIZE * HEADS * 6 * 2 * LAYERS
    assert acknowledged.num_bytes == landed.num_bytes == size
    two.assert_copied()
    two.d.transport.revoke(GRANT)
    two.d.event(RELEASED)
    assert not two.p.transport._whole_of and not two.d.transport._whole_of
    for instance in (two.p, two.d):
        ledger = instance.transport.ledger()
        assert (ledger["grants_open"], ledger["grants_given"]) == (0, 0)


@pytest.mark.parametrize("two", [(2, 2, False)], indirect=True, ids=str)
def test_a_rank_gives_a_layer_when_it_has_stored_it_itself(two: Two) -> None:
    """Rank 0 may be ahead."""
    two.open()
    two.p.begin_step()
    two.p.progress[0].stored(0)
    two.push(0)
    wait("rank 0's part", lambda: two.p.transport._ports[0].ledger()["bytes_sent"] > 0)
    time.sleep(0.1)
    assert two.d.ranks[1].cache[0][TARGETS[0]].max() == 0xC5 == two.d.ranks[1].cache[0].min()
    two.p.stored(0)
    two.p.stored(1)
    two.push(1)
    two.p.transport.commit(GRANT)
    two.p.event(ACKNOWLEDGED)
    two.assert_copied()


@pytest.mark.parametrize("two", [(2, 1, False), (1, 2, False)], indirect=True, ids=str)
def test_a_part_that_fails_is_the_end_of_the_whole_and_told_once(two: Two) -> None:
    two.open()
    two.p.begin_step()
    two.p.stored(LAYERS - 1)
    two.push(0)  # the other layers never come
    two.p.transport.commit(GRANT)
    two.p.event(FAILED)
    two.d.event(FAILED)
    two.p.transport.abandon(GRANT)
    two.d.transport.revoke(GRANT)
    two.d.event(RELEASED)
    assert not two.p.transport._whole_of and not two.d.transport._whole_of


@pytest.mark.parametrize("two", [(2, 4, False)], indirect=True, ids=str)
def test_what_is_abandoned_is_let_go_of_by_every_rank(two: Two) -> None:
    two.open()
    two.p.begin_step()
    two.p.stored(LAYERS - 1)
    two.push(0)
    two.p.transport.abandon(GRANT)
    assert two.p.transport.ledger()["grants_given"] == 0
    assert not two.p.transport._whole_of
    two.p.transport.abandon(GRANT)  # again: nothing
    two.p.transport.push(GRANT, 0, 0, (1,))
    two.p.transport.commit(GRANT)
    two.d.transport.revoke(GRANT)
    two.d.event(RELEASED)


@pytest.mark.parametrize("two", [(2, 1, False), (2, 1, True), (2, 4, True)], indirect=True, ids=str)
def test_a_probe_goes_over_every_way_and_is_answered_once(two: Two) -> None:
    """By the side that connects."""
    asks, other = (two.d, two.p) if two.pull else (two.p, two.d)
    probe = GiverGrant(
        grant=GRANT,
        endpoints=other.endpoints,
        peer_incarnation=other.ranks[0].name,
        block_size=D_SIZE,
        prompt_digest=b"",
        peer_ranks=len(other.ranks),
    )
    asks.transport.probe(probe, 1000, fetch=two.pull)
    assert asks.event(ACKNOWLEDGED).seconds > 0
    assert not asks.transport._whole_of


@pytest.mark.parametrize("two", [(2, 1, False)], indirect=True, ids=str)
def test_poison_reaches_every_rank(two: Two) -> None:
    two.p.transport.poison([2, 3])
    for rank in two.p.ranks:
        for cache in rank.cache:
            assert (cache[[2, 3]] == POISON[0]).all()
            assert (cache[[0, 1]] != POISON[0]).any()


@pytest.mark.parametrize("two", [(2, 1, False)], indirect=True, ids=str)
def test_a_rank_that_is_gone_ends_the_engine(two: Two) -> None:
    two.p.pipes[0].shutdown(socket.SHUT_RDWR)
    with pytest.raises(EngineDied, match="rank 1"):
        two.p.transport.ledger()
    with pytest.raises(EngineDied, match="rank 1"):
        two.p.transport.poll()


def test_a_servant_closes_its_port_when_rank_0_is_gone() -> None:
    before = set(threading.enumerate())  # some may be of a test before, and end meanwhile
    instance = Instance("p", 2, P_SIZE, P_BLOCKS)
    assert not set(threading.enumerate()) <= before
    instance.close()
    instance.close()
    wait("the threads to end", lambda: set(threading.enumerate()) <= before)


def test_a_layer_that_is_never_stored_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_servant, "STORED_S", 0.01)
    progress = Progress()
    progress.begin()
    progress.stored(0)
    progress.wait(1, 0)
    with pytest.raises(InternalError, match="layer 1 of step 1"):
        progress.wait(1, 1)
    progress.begin()
    progress.wait(1, 7)  # an earlier step has all


def test_parts_are_named_alike_on_both_sides_and_unlike_each_other() -> None:
    routes = [
        HeadRoute(giver_rank=giver, taker_rank=taker, source=0, target=0, count=1)
        for giver in range(3)
        for taker in range(3)
    ]
    names = {part_name(GRANT, route, 9) for route in routes}
    assert len(names) == 9
    assert {len(name) for name in names} == {16}
    assert part_name(GRANT, routes[0], 1) == GRANT
    assert part_name(b"", routes[0], 9) == b""


def test_an_order_keeps_its_fields_over_the_line() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        servant = servant_pipe(theirs)
        servant.send(rank_servant.rank_line.Joined(rank=3, endpoint="h:1"))
        line = RankLine(ours, RealClock())
        assert (line.rank, line.endpoint) == (3, "h:1")
        line.step = 7
        line.push(GRANT, 2, 1, (4, 5))
        order = Push(grant=GRANT, layer=2, first=1, block_ids=(4, 5), step=7)
        assert servant.receive() == [order]
