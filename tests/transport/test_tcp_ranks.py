"""Ranks of two instances that hand over to each other: each gives the heads that it has to who owns them, and nothing else is written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np
import pytest

from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory, in_pieces
from xllm_py.core.kv_plan import HeadRoute, Share, head_routes, heads_of
from xllm_py.transport.base import GiverGrant, KvEventKind, TakerGrant
from xllm_py.transport.tcp import TcpKvTransport

KEY = b"k" * 32
DIGEST = b"d" * 16
HEADS, HEAD_BYTES, LAYERS = 4, 6, 2
SOURCES, TARGETS = (3, 0, 5), (1, 6, 2, 8, 4, 7)  # of P's larger blocks, and of D's smaller ones
P_SIZE, D_SIZE, P_BLOCKS, D_BLOCKS = 8, 4, 6, 10
CANARY = 0xC5


def layout(heads: int, block_size: int) -> KvLayout:
    return KvLayout(
        num_layers=LAYERS,
        block_size=block_size,
        block_bytes=block_size * heads * HEAD_BYTES,
        shape="test",
        num_heads=heads,
    )


@dataclass
class Rank:
    """Its cache, as [block, token, head, byte] of each layer and part, and its transport."""

    share: Share
    block_size: int
    num_blocks: int
    name: str
    cache: list[np.ndarray] = field(default_factory=list)

    def open(self) -> TcpKvTransport:
        heads = len(heads_of(self.share.rank, self.share.num_ranks, HEADS))
        size = (self.num_blocks, self.block_size, heads, HEAD_BYTES)
        self.cache = [np.full(size, CANARY, np.uint8) for _ in range(LAYERS * PARTS)]
        regions = [memoryview(each).cast("B") for each in self.cache]
        memory = KvMemory(layout(heads, self.block_size), self.num_blocks, regions)
        return TcpKvTransport(
            memory=memory, incarnation=self.name, cluster_key=KEY, share=self.share
        )


def shares(count: int) -> list[Share]:
    return [Share(rank=rank, num_ranks=count, num_heads=HEADS) for rank in range(count)]


@dataclass
class Site:
    """All ranks of P and of D, with their transports."""

    p: list[Rank]
    d: list[Rank]
    givers: list[TcpKvTransport]
    takers: list[TcpKvTransport]
    whole: list[np.ndarray]  # what P's ranks hold, of each layer and part, with every head

    @property
    def routes(self) -> list[HeadRoute]:
        return head_routes(len(self.p), len(self.d), HEADS)

    def hand_over(self, *, pull: bool) -> None:
        for index, route in enumerate(self.routes):
            grant = bytes([index + 1]) * 16
            giver, taker = self.givers[route.giver_rank], self.takers[route.taker_rank]
            read_grant = bytes([index + 101]) * 16 if pull else b""
            stream = taker.open_grant(
                TakerGrant(
                    grant=grant,
                    peer_incarnation="p",
                    block_size=D_SIZE,
                    block_ids=TARGETS,
                    first_wanted=0,
                    prompt_digest=DIGEST,
                    sources=(giver.endpoint,) if pull else (),
                    read_grant=read_grant,
                    peer_rank=route.giver_rank,
                    peer_ranks=len(self.p),
                )
            )
            giver.connect(
                GiverGrant(
                    grant=grant,
                    endpoints=() if pull else (taker.endpoint,),
                    peer_incarnation="d",
                    block_size=D_SIZE,
                    prompt_digest=DIGEST,
                    read_grant=read_grant,
                    stream=stream,
                    peer_rank=route.taker_rank,
                    peer_ranks=len(self.d),
                )
            )
            for layer in range(LAYERS):
                giver.push(grant, layer, 0, in_pieces(SOURCES, P_SIZE // D_SIZE))
            giver.commit(grant)
        wait_for(self.takers, KvEventKind.LANDED, len(self.routes))
        wait_for(self.givers, KvEventKind.ACKNOWLEDGED, len(self.routes))


def wait_for(transports: list[TcpKvTransport], kind: KvEventKind, count: int) -> None:
    deadline, found = time.monotonic() + 10.0, 0
    while found < count:
        assert time.monotonic() < deadline, f"{found} of {count} {kind}"
        for each in transports:
            for event in each.poll():
                assert event.kind is not KvEventKind.FAILED, event.text
                found += event.kind is kind
        time.sleep(0.005)


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    p_ranks, d_ranks = request.param
    p = [Rank(share, P_SIZE, P_BLOCKS, "p") for share in shares(p_ranks)]
    d = [Rank(share, D_SIZE, D_BLOCKS, "d") for share in shares(d_ranks)]
    with ExitStack() as stack:
        givers = [stack.enter_context(closing(each.open())) for each in p]
        takers = [stack.enter_context(closing(each.open())) for each in d]
        source = random.Random(1)
        size = (P_BLOCKS, P_SIZE, HEADS, HEAD_BYTES)
        whole = [
            np.frombuffer(source.randbytes(np.prod(size)), np.uint8).reshape(size)
            for _ in range(LAYERS * PARTS)
        ]
        for rank in p:
            mine = heads_of(rank.share.rank, rank.share.num_ranks, HEADS)
            for cache, content in zip(rank.cache, whole, strict=True):
                cache[:] = content[:, :, mine.start : mine.stop]
        yield Site(p, d, givers, takers, whole)


@pytest.mark.parametrize("pull", [False, True], ids=["push", "pull"])
@pytest.mark.parametrize(
    "site", [(1, 2), (2, 1), (2, 2), (4, 2), (1, 8), (8, 1), (8, 2), (2, 8)], indirect=True, ids=str
)
def test_every_head_comes_to_who_owns_it(site: Site, pull: bool) -> None:
    site.hand_over(pull=pull)
    for rank in site.d:
        mine = heads_of(rank.share.rank, rank.share.num_ranks, HEADS)
        for cache, content in zip(rank.cache, site.whole, strict=True):
            wanted = content[list(SOURCES), :, mine.start : mine.stop]
            found = cache[list(TARGETS)]
            assert np.array_equal(found.reshape(wanted.shape), wanted)
            others = [block for block in range(D_BLOCKS) if block not in TARGETS]
            assert (cache[others] == CANARY).all()


@pytest.mark.parametrize(
    ("site", "taken_for"),
    [((2, 2), 1), ((1, 2), 0)],
    indirect=["site"],
    ids=["it has nothing for that rank", "it takes that rank for another one"],
)
def test_a_link_between_ranks_that_do_not_fit_is_refused(site: Site, taken_for: int) -> None:
    """To the second one of D's."""
    giver = site.givers[0]
    giver.connect(
        GiverGrant(
            grant=b"g" * 16,
            endpoints=(site.takers[1].endpoint,),
            peer_incarnation="d",
            block_size=D_SIZE,
            prompt_digest=DIGEST,
            peer_rank=taken_for,
            peer_ranks=2,
        )
    )
    deadline, events = time.monotonic() + 10.0, giver.poll()
    while not events and time.monotonic() < deadline:
        time.sleep(0.005)
        events = giver.poll()
    assert [event.kind for event in events] == [KvEventKind.FAILED]
