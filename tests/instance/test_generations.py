"""Outputs on their way to a master: in order, kept until acknowledged, sent again after a break, given up in the end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from tests.instance.support import (
    FakeNetwork,
    FakeStream,
    ack,
    again,
    cancel,
    entries,
    outputs,
    settle,
    until,
)
from xllm_py.base.clock import HandClock
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.plan import Outputs
from xllm_py.instance.generations import GIVE_UP_S, Generations
from xllm_py.instance.outlets import Destination
from xllm_py.wire.control_messages import GenerationsDown, GenerationsUp
from xllm_py.wire.messages import Verdicts

MASTER = Destination("master:1")
RELAY = Destination("p:1", relay=True, master="master:1")


class Speaker:
    """Generations of one instance over a fake network."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.clock = HandClock()
        self.tasks = TaskFamily("speaker")
        self.cancelled: list[tuple[str, int]] = []
        self.broken: list[Destination] = []
        self.rerouted: list[tuple[list[str], Destination]] = []
        self.seen_first: list[GenerationsDown] = []
        self.generations = Generations(
            name="d",
            incarnation="dd",
            connect=self.network.connect,
            tasks=self.tasks,
            clock=self.clock,
            on_cancel=self._on_cancel,
            on_relayed=self._on_relayed,
            on_broken=self.broken.append,
            on_rerouted=lambda request_ids, to: self.rerouted.append((request_ids, to)),
        )

    def _on_cancel(self, request_ids: list[str], attempts: list[int]) -> None:
        self.cancelled += zip(request_ids, attempts, strict=True)

    def _on_relayed(self, down: GenerationsDown) -> GenerationsDown:
        self.seen_first.append(down)
        return down

    def say(self, *rows: tuple[object, ...], to: Destination = MASTER) -> None:
        self.generations.send(to, outputs(*rows))


@pytest.fixture
async def speaker() -> AsyncIterator[Speaker]:
    made = Speaker()
    yield made
    await made.tasks.close()


async def said(stream: FakeStream, count: int) -> list[tuple[str, int, int]]:
    """Everything on a stream, once it is so many entries."""
    await until(f"{count} entries", lambda: len(entries(stream.sent)) >= count)
    await settle()
    return entries(stream.sent)


def forwarded(token_id: int, reason: str = "") -> GenerationsUp:
    """A message of another decode instance that goes through here."""
    return GenerationsUp(
        name="x", incarnation="xx", sequence=0, outputs=outputs(("far", 1, token_id, reason))
    )


async def test_a_stream_begins_with_an_empty_message_that_says_who_speaks(
    speaker: Speaker,
) -> None:
    speaker.generations.open(MASTER)
    stream = await speaker.network.stream("master:1")
    await until("the first message", lambda: stream.sent)
    first = stream.sent[0]
    assert (first.name, first.incarnation, entries([first])) == ("d", "dd", [])
    assert stream.kind == "master"


async def test_a_forwarded_message_is_never_the_first_one(speaker: Speaker) -> None:
    """The master takes the first message's incarnation for the owner of the stream."""
    speaker.generations.forward(MASTER, forwarded(7))
    stream = await speaker.network.stream("master:1")
    assert await said(stream, 1) == [("far", 1, 7)]
    assert [up.incarnation for up in stream.sent] == ["dd", "xx"]
    speaker.network.away.add("master:1")
    stream.cut()
    await speaker.network.stream("master:1", 1)
    speaker.generations.forward(MASTER, forwarded(8))
    speaker.network.away.clear()
    await until("a good stream", lambda: speaker.network.to("master:1")[-1].sent)
    last = speaker.network.to("master:1")[-1]
    await said(last, 1)
    assert [up.incarnation for up in last.sent] == ["dd", "xx"]


async def test_entries_go_out_in_order_one_message_a_step(speaker: Speaker) -> None:
    for position in range(5):
        speaker.say(("a", position, 10 + position), ("b", position, 20 + position))
    stream = await speaker.network.stream("master:1")
    found = await said(stream, 10)
    assert [row for row in found if row[0] == "a"] == [("a", at, 10 + at) for at in range(5)]
    numbers = [up.sequence for up in stream.sent]
    assert numbers == sorted(set(numbers))


async def test_what_was_not_acknowledged_is_said_again_on_the_next_stream(
    speaker: Speaker,
) -> None:
    speaker.say(("a", 0, 5))
    speaker.say(("a", 1, 6), ("b", 0, 7))
    first = await speaker.network.stream("master:1")
    await said(first, 3)
    first.answer(ack("a", 1))
    await settle()
    first.cut()
    second = await speaker.network.stream("master:1", 1)
    assert sorted(await said(second, 2)) == [("a", 1, 6), ("b", 0, 7)]
    speaker.say(("a", 2, 8))
    assert (await said(second, 3))[-1] == ("a", 2, 8)
    assert first.closed


async def test_what_is_said_while_no_stream_is_open_is_not_lost(speaker: Speaker) -> None:
    speaker.network.away.add("master:1")
    speaker.say(("a", 0, 5))
    await speaker.network.stream("master:1", 1)
    speaker.say(("a", 1, 6, "stop"))
    speaker.network.away.clear()
    await until("a good stream", lambda: speaker.network.to("master:1")[-1].sent)
    assert await said(speaker.network.to("master:1")[-1], 2) == [("a", 0, 5), ("a", 1, 6)]


async def test_a_stream_the_master_closes_in_order_is_opened_again(speaker: Speaker) -> None:
    speaker.say(("a", 0, 5))
    first = await speaker.network.stream("master:1")
    await said(first, 1)
    first.end()
    assert await said(await speaker.network.stream("master:1", 1), 1) == [("a", 0, 5)]


async def test_an_acknowledged_finish_is_forgotten(speaker: Speaker) -> None:
    speaker.say(("a", 0, 5), ("b", 0, 1))
    speaker.say(("a", 1, -1, "length"))
    stream = await speaker.network.stream("master:1")
    await said(stream, 3)
    assert speaker.generations.num_unacknowledged == 2
    stream.answer(ack("a", 2))
    stream.answer(ack("unknown", 9))
    await until("the acknowledgement", lambda: speaker.generations.num_unacknowledged == 1)


async def test_an_acknowledgement_of_another_choice_or_attempt_forgets_nothing(
    speaker: Speaker,
) -> None:
    speaker.say(("a", 0, 5))
    stream = await speaker.network.stream("master:1")
    await said(stream, 1)
    down = GenerationsDown()
    down.acks.add("a", 1, 1, 9)
    down.acks.add("a", 2, 0, 9)
    stream.answer(down)
    await until("the word", lambda: speaker.seen_first)
    await settle()
    assert speaker.generations.num_unacknowledged == 1


async def test_asked_again_it_says_everything_that_is_not_acknowledged(speaker: Speaker) -> None:
    for position in range(3):
        speaker.say(("a", position, position))
    stream = await speaker.network.stream("master:1")
    await said(stream, 3)
    stream.answer(ack("a", 1))
    stream.answer(again("a", 1))
    stream.answer(again("never heard of", 0))
    assert (await said(stream, 5))[3:] == [("a", 1, 1), ("a", 2, 2)]


async def test_a_cancel_ends_the_request_and_forgets_it(speaker: Speaker) -> None:
    speaker.say(("a", 0, 5), ("b", 0, 6))
    stream = await speaker.network.stream("master:1")
    await said(stream, 2)
    stream.answer(cancel("a"))
    await until("the cancel", lambda: speaker.cancelled == [("a", 1)])
    assert speaker.generations.num_unacknowledged == 1
    speaker.generations.forget("b", 2)
    assert speaker.generations.num_unacknowledged == 1
    speaker.generations.forget("b", 1)
    assert speaker.generations.num_unacknowledged == 0


async def test_sparse_columns_come_along_and_come_again(speaker: Speaker) -> None:
    made = outputs(("a", 0, 5), ("b", 4, -1, "queue_full"))
    made.messages[1] = "full"
    made.cached_tokens[0] = 16
    made.journeys[1] = {"received": 0.0}

    speaker.generations.send(MASTER, made)
    for number in range(2):
        stream = await speaker.network.stream("master:1", number)
        await said(stream, 2)
        for up in stream.sent:
            if "b" in up.outputs.request_ids:
                at = up.outputs.request_ids.index("b")
                assert up.outputs.messages == {at: "full"}
                assert up.outputs.journeys == {at: {"received": 0.0}}
                assert up.outputs.finish_reasons[at] == "queue_full"
            if "a" in up.outputs.request_ids:
                at = up.outputs.request_ids.index("a")
                assert up.outputs.cached_tokens == {at: 16}
        stream.cut()


async def test_a_master_that_stays_away_loses_its_requests(speaker: Speaker) -> None:
    speaker.say(("a", 0, 5), ("b", 0, 6))
    stream = await speaker.network.stream("master:1")
    await said(stream, 2)
    speaker.network.away.add("master:1")
    stream.cut()
    await speaker.network.stream("master:1", 2)
    assert speaker.cancelled == []

    def time_passes() -> bool:
        speaker.clock.turn(0.02)
        return len(speaker.cancelled) == 2

    before = speaker.clock.now()
    await until("both to be given up", time_passes)
    assert speaker.clock.now() - before > GIVE_UP_S - 1
    assert sorted(speaker.cancelled) == [("a", 1), ("b", 1)]
    await until("the end of the stream's task", lambda: speaker.tasks.size == 0)
    assert speaker.generations.num_unacknowledged == 0
    speaker.network.away.clear()
    speaker.say(("c", 0, 7))
    await until("a good stream", lambda: speaker.network.to("master:1")[-1].sent)
    assert await said(speaker.network.to("master:1")[-1], 1) == [("c", 0, 7)]


async def test_a_master_that_was_heard_again_is_waited_for_anew(speaker: Speaker) -> None:
    """However short it was there."""
    speaker.say(("a", 0, 5))
    stream = await speaker.network.stream("master:1")
    await said(stream, 1)
    speaker.network.away.add("master:1")
    stream.cut()
    await speaker.network.stream("master:1", 2)
    speaker.clock.turn(GIVE_UP_S - 0.5)
    speaker.network.away.clear()
    await until("a good stream", lambda: speaker.network.to("master:1")[-1].sent)
    stream = speaker.network.to("master:1")[-1]
    await said(stream, 1)
    stream.answer(ack("a", 1))
    speaker.say(("b", 0, 6))
    await said(stream, 2)
    speaker.network.away.add("master:1")
    speaker.clock.turn(0.6)
    stream.cut()
    before = len(speaker.network.to("master:1"))
    await until("the next try", lambda: len(speaker.network.to("master:1")) > before)
    await settle()
    assert speaker.cancelled == []


async def test_a_relayed_stream_that_breaks_goes_straight_to_the_master(speaker: Speaker) -> None:
    speaker.say(("a", 1, 5), ("b", 1, 6), to=RELAY)
    relayed = await speaker.network.stream("p:1")
    assert relayed.kind == "instance"
    await said(relayed, 2)
    relayed.answer(ack("b", 2))
    await settle()
    relayed.cut()
    straight = await speaker.network.stream("master:1")
    assert straight.kind == "master"
    assert await said(straight, 1) == [("a", 1, 5)]
    assert straight.sent[0].incarnation == "dd"
    assert speaker.network.to("p:1") == [relayed]
    assert speaker.rerouted == [(["a"], MASTER)]


async def test_a_giver_that_stands_still_is_left_when_a_master_says_that_it_is_lost(
    speaker: Speaker,
) -> None:
    speaker.say(("a", 1, 5), to=RELAY)
    relayed = await speaker.network.stream("p:1")
    await said(relayed, 1)
    relayed.holding.clear()  # its window is full, and nothing breaks
    speaker.say(("a", 2, 6), to=RELAY)
    await settle()
    speaker.generations.leave("q:1")
    assert not speaker.network.to("master:1")
    speaker.generations.leave("p:1")
    straight = await speaker.network.stream("master:1")
    assert await said(straight, 2) == [("a", 1, 5), ("a", 2, 6)]
    assert speaker.rerouted == [(["a"], MASTER)]
    await until("the end of the old stream", lambda: relayed.closed)
    assert speaker.network.to("p:1") == [relayed]
    assert speaker.network.to("master:1") == [straight]


async def test_a_broken_stream_to_a_master_is_told_and_a_relayed_one_is_not(
    speaker: Speaker,
) -> None:
    speaker.say(("a", 1, 5), to=RELAY)
    (await speaker.network.stream("p:1")).cut()
    straight = await speaker.network.stream("master:1")
    assert speaker.broken == []
    straight.cut()
    await speaker.network.stream("master:1", 1)
    assert speaker.broken == [MASTER]


async def test_verdicts_go_out_beside_outputs(speaker: Speaker) -> None:
    verdicts = Verdicts(
        request_ids=["a"],
        attempts=[1],
        kinds=["landed"],
        reasons=[""],
        num_bytes=[9],
        seconds=[0.1],
        exposed=[0.05],
    )
    speaker.generations.send_verdicts(MASTER, verdicts)
    stream = await speaker.network.stream("master:1")
    await until("the verdict", lambda: stream.sent and stream.sent[-1].verdicts.request_ids)
    assert stream.sent[-1].verdicts == verdicts


class LoggingMaster:
    """A token log: one token per position, whoever says it how often; asks again for what it lacks."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[int, int]] = {}
        self.num_read: dict[int, int] = {}

    def read(self, streams: list[FakeStream]) -> set[str]:
        """Take what is new on every stream; the requests it was about."""
        heard = set()
        for number, stream in enumerate(streams):
            start = self.num_read.get(number, 0)
            for request_id, position, token in entries(stream.sent[start:]):
                known = self.tokens.setdefault(request_id, {})
                assert known.setdefault(position, token) == token
                heard.add(request_id)
            self.num_read[number] = len(stream.sent)
        return heard

    def next(self, request_id: str) -> int:
        """The first position that is missing."""
        known = self.tokens.get(request_id, {})
        return next(at for at in range(len(known) + 1) if at not in known)


@pytest.mark.parametrize("seed", range(12))
async def test_however_streams_break_every_token_arrives_and_everything_is_forgotten(
    speaker: Speaker, seed: int
) -> None:
    chance = random.Random(seed)
    master = LoggingMaster()
    said_of = dict.fromkeys(("a", "b", "c"), 0)
    length = 25
    for _ in range(2000):
        name = chance.choice(list(said_of))
        if said_of[name] < length:
            at = said_of[name]
            speaker.say((name, at, at * 7, "stop" if at == length - 1 else ""))
            said_of[name] += 1
        for _ in range(chance.choice((0, 1, 1, 5))):
            await settle()
        streams = speaker.network.to("master:1")
        for heard in master.read(streams):
            if chance.random() < 0.7:
                streams[-1].answer(ack(heard, master.next(heard)))
            if master.next(heard) < len(master.tokens[heard]) and chance.random() < 0.5:
                streams[-1].answer(again(heard, master.next(heard)))
        if streams and chance.random() < 0.05 and len(streams) < 6:
            streams[-1].cut()
        if min(said_of.values()) == length and len(streams) >= 3:
            break
    streams = speaker.network.to("master:1")
    streams[-1].cut()  # whatever was in flight is gone; the rest is said on a last stream
    last = await speaker.network.stream("master:1", len(streams))
    await until("who speaks", lambda: last.sent)
    await settle()
    master.read(speaker.network.to("master:1"))
    wanted = {at: at * 7 for at in range(length)}
    assert master.tokens == dict.fromkeys(said_of, wanted)
    for name in said_of:
        last.answer(ack(name, length))
    await until("all to be forgotten", lambda: not speaker.generations.num_unacknowledged)


async def test_a_step_of_nothing_is_no_burden(speaker: Speaker) -> None:
    speaker.generations.send(MASTER, Outputs())
    stream = await speaker.network.stream("master:1")
    await until("the first message", lambda: stream.sent)
    assert speaker.generations.num_unacknowledged == 0
