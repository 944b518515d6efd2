"""Copies of blocks before they leave and after they have landed, around any transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from xllm_py.core.kv_memory import KvLayout, KvMemory
from xllm_py.transport import mirrored
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant

GRANT, OTHER = b"g" * 16, b"o" * 16


class Log:
    """A mirror and a transport that note, in one list, what is asked of them."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.events: list[KvEvent] = []
        self.endpoint, self.wake_fd = "host:1", 7
        self.revoke = self.commit = self.probe = self.ledger = self.close = self._plain

    def _plain(self, *given: Any) -> None:
        self.said.append(given)

    def take_out(self, layer: int, block_ids: Sequence[int]) -> Callable[[], None]:
        self.said.append(("begin", layer, list(block_ids)))
        return lambda: self.said.append(("out", layer, list(block_ids)))

    def put_in(self, block_ids: Sequence[int]) -> None:
        self.said.append(("in", list(block_ids)))

    def open_grant(self, grant: TakerGrant) -> int:
        return 3

    def connect(self, grant: GiverGrant) -> None:
        pass

    def push(self, grant: bytes, layer: int, first: int, block_ids: tuple[int, ...]) -> None:
        self.said.append(("push", grant, layer, first, block_ids))

    def abandon(self, grant: bytes) -> None:
        pass

    def poll(self) -> list[KvEvent]:
        events, self.events = self.events, []
        return events


def opened() -> tuple[Log, mirrored.MirroredTransport]:
    """Blocks of 8 tokens."""
    log = Log()
    layout = KvLayout(num_layers=3, block_size=8, block_bytes=16, shape="")
    regions = [memoryview(bytearray(160)) for _ in range(6)]
    memory = KvMemory(layout, 10, regions, log)
    made = mirrored.over(log, memory)  # type: ignore[arg-type]  # what is asked for is there
    assert isinstance(made, mirrored.MirroredTransport)
    return log, made


def giver(block_size: int = 8) -> GiverGrant:
    return GiverGrant(
        grant=GRANT,
        endpoints=(),
        peer_incarnation="p",
        block_size=block_size,
        prompt_digest=b"",
    )


def taker(block_size: int, block_ids: tuple[int, ...], first_wanted: int) -> TakerGrant:
    return TakerGrant(
        grant=GRANT,
        peer_incarnation="p",
        block_size=block_size,
        block_ids=block_ids,
        first_wanted=first_wanted,
        prompt_digest=b"",
    )


def test_a_memory_that_is_the_cache_needs_no_copies() -> None:
    layout = KvLayout(num_layers=1, block_size=8, block_bytes=16, shape="")
    memory = KvMemory(layout, 1, [memoryview(bytearray(16)) for _ in range(2)])
    log = Log()
    assert mirrored.over(log, memory) is log  # type: ignore[arg-type,comparison-overlap]  # as above


def test_blocks_are_taken_out_before_they_are_pushed() -> None:
    log, transport = opened()
    transport.connect(giver())
    transport.push(GRANT, 2, 0, (4, 2))
    assert log.said == [
        ("begin", 2, [2, 4]),
        ("out", 2, [2, 4]),
        ("push", GRANT, 2, 0, (4, 2)),
    ]


def test_the_copy_of_a_layer_begins_before_that_of_the_last_one_is_waited_for() -> None:
    log, transport = opened()
    transport.connect(giver())
    for layer in range(3):
        transport.push(GRANT, layer, 0, (4,))
    order = [(each[0], each[2 if each[0] == "push" else 1]) for each in log.said]
    assert order == [
        ("begin", 0),
        ("begin", 1),
        ("out", 0),
        ("push", 0),
        ("begin", 2),
        ("out", 1),
        ("push", 1),
        ("out", 2),
        ("push", 2),
    ]


def test_a_copy_left_over_from_a_step_that_broke_off_is_done_before_its_blocks_are_anybody_elses() -> (
    None
):
    for ask in (
        lambda transport: transport.poll(),
        lambda transport: transport.open_grant(taker(8, (4,), 0)),
    ):
        log, transport = opened()
        transport.connect(giver())
        transport.push(GRANT, 0, 0, (4,))  # the step raised before the next layer
        ask(transport)
        assert [each[0] for each in log.said] == ["begin", "out", "push"]


@pytest.mark.parametrize("end", ["commit", "abandon"])
def test_what_is_begun_is_pushed_before_its_grant_is_done_with(end: str) -> None:
    log, transport = opened()
    transport.connect(giver())
    transport.push(GRANT, 0, 0, (4,))
    assert [each[0] for each in log.said] == ["begin"]
    getattr(transport, end)(GRANT)
    assert [each[0] for each in log.said][:3] == ["begin", "out", "push"]


def test_parts_of_a_block_take_the_whole_block_out_once() -> None:
    log, transport = opened()
    transport.connect(giver(block_size=2))
    transport.push(GRANT, 0, 1, (9, 10, 11, 12))
    assert log.said[0] == ("begin", 0, [2, 3])


def test_what_was_abandoned_or_has_ended_copies_nothing() -> None:
    log, transport = opened()
    transport.connect(giver())
    transport.abandon(GRANT)
    transport.push(GRANT, 0, 0, (1,))
    transport.connect(giver())
    log.events = [KvEvent(kind=KvEventKind.ACKNOWLEDGED, grant=GRANT)]
    transport.poll()
    transport.push(GRANT, 0, 0, (1,))
    assert [each[0] for each in log.said] == ["push", "push"]


def test_landed_blocks_are_put_in_before_anybody_hears_of_it() -> None:
    log, transport = opened()
    assert transport.open_grant(taker(2, (12, 13, 14, 15, 20, 21), 4)) == 3
    log.events = [KvEvent(kind=KvEventKind.RECEIVING, grant=GRANT)]
    transport.poll()
    assert log.said == []
    landed = KvEvent(kind=KvEventKind.LANDED, grant=GRANT)
    log.events = [KvEvent(kind=KvEventKind.LANDED, grant=OTHER), landed]
    assert transport.poll()[1] == landed
    assert log.said == [("in", [5])]
    log.events = [landed]
    transport.poll()
    assert log.said == [("in", [5])], "once"


def test_what_was_taken_back_is_not_put_in() -> None:
    log, transport = opened()
    transport.open_grant(taker(8, (1, 2), 0))
    log.events = [
        KvEvent(kind=KvEventKind.RELEASED, grant=GRANT),
        KvEvent(kind=KvEventKind.LANDED, grant=GRANT),
    ]
    transport.poll()
    assert log.said == []


def test_the_rest_is_the_inner_ones() -> None:
    log, transport = opened()
    assert (transport.endpoint, transport.wake_fd) == ("host:1", 7)
    transport.commit(GRANT)
    assert log.said == [(GRANT,)]


def test_poison_reaches_the_cache() -> None:
    log = Log()
    layout = KvLayout(num_layers=1, block_size=8, block_bytes=16, shape="")
    memory = KvMemory(layout, 2, [memoryview(bytearray(32)) for _ in range(2)], log)
    memory.poison([1])
    assert log.said == [("in", [1])]
