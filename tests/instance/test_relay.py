"""Relayed mode at P: D's stream ends here, goes on to the master, and the master's word finds its way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.instance.support import (
    FakeNetwork,
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
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination
from xllm_py.instance.relay import Relay
from xllm_py.wire.control_messages import GenerationsDown, GenerationsUp

MASTER = Destination("master:1")
SECOND = Destination("master:2")


class Giver:
    """P: a relay over its own streams to masters."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.tasks = TaskFamily("giver")
        self.relay = Relay(HandClock())
        self.cancelled: list[str] = []
        self.generations = Generations(
            name="p",
            incarnation="pp",
            connect=self.network.connect,
            tasks=self.tasks,
            clock=HandClock(),
            on_cancel=lambda request_ids, _: self.cancelled.extend(request_ids),
            on_relayed=self.relay.take,
            on_broken=self.relay.cut,
            on_rerouted=lambda request_ids, to: None,
        )


class Taker:
    """D: its stream to P."""

    def __init__(self, giver: Giver, incarnation: str = "dd") -> None:
        self.incarnation = incarnation
        self.downs: list[GenerationsDown] = []
        self.ended = False
        self._ups: asyncio.Queue[GenerationsUp | None] = asyncio.Queue()
        self._giver = giver
        giver.tasks.start(self._listen(), name=f"stream of {incarnation}")
        self.say()

    async def _listen(self) -> None:
        async for down in self._giver.relay.serve(self._read(), self._giver.generations):
            self.downs.append(down)
        self.ended = True

    async def _read(self) -> AsyncIterator[GenerationsUp]:
        while (up := await self._ups.get()) is not None:
            yield up

    def say(self, *rows: tuple[object, ...]) -> None:
        self._ups.put_nowait(
            GenerationsUp(
                name="d", incarnation=self.incarnation, sequence=3, outputs=outputs(*rows)
            )
        )

    def leave(self) -> None:
        self._ups.put_nowait(None)

    def acks(self) -> list[tuple[str, int]]:
        return [
            row
            for down in self.downs
            for row in zip(down.acks.request_ids, down.acks.nexts, strict=True)
        ]


@pytest.fixture
async def giver() -> AsyncIterator[Giver]:
    made = Giver()
    yield made
    await made.tasks.close()


async def test_messages_go_on_to_the_master_unchanged_under_the_takers_name(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    taker.say(("a", 2, 6, "stop"))
    stream = await giver.network.stream("master:1")
    await until("both entries", lambda: len(entries(stream.sent)) == 2)
    assert [(up.incarnation, up.sequence) for up in stream.sent] == [
        ("pp", 0),
        ("dd", 3),
        ("dd", 3),
    ]
    assert stream.sent[2].outputs.finish_reasons == ["stop"]
    assert giver.generations.num_unacknowledged == 0  # they are D's to keep


async def test_a_message_for_two_masters_reaches_both(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    giver.relay.open("b", SECOND)
    Taker(giver).say(("a", 1, 5), ("b", 1, 6))
    for address in ("master:1", "master:2"):
        stream = await giver.network.stream(address)
        await until(f"entries at {address}", lambda s=stream: entries(s.sent))


async def test_the_masters_word_reaches_the_taker_of_the_request(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    giver.relay.open("b", MASTER)
    one, two = Taker(giver), Taker(giver, "ee")
    one.say(("a", 1, 5))
    two.say(("b", 1, 6))
    stream = await giver.network.stream("master:1")
    await until("both entries", lambda: len(entries(stream.sent)) == 2)
    stream.answer(ack("a", 2))
    stream.answer(again("b", 1))
    stream.answer(ack("b", 2))
    await until("both words", lambda: one.downs and len(two.downs) == 2)
    assert one.acks() == [("a", 2)]
    assert two.acks() == [("b", 2)]
    assert two.downs[0].again.request_ids == ["b"]


async def test_the_acknowledgement_of_the_first_token_is_the_givers_own(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    giver.generations.send(MASTER, outputs(("a", 0, 4)))
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("both entries", lambda: len(entries(stream.sent)) == 2)
    assert giver.generations.num_unacknowledged == 1
    stream.answer(ack("a", 1))
    await until("the first token", lambda: not giver.generations.num_unacknowledged)
    await settle()
    assert taker.downs == []


async def test_a_cancel_goes_down_to_the_taker_and_closes_the_request(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: entries(stream.sent))
    stream.answer(cancel("a"))
    await until("the cancel", lambda: taker.downs)
    assert taker.downs[0].cancels.request_ids == ["a"]
    assert giver.cancelled == []
    assert giver.relay.num_open == 0


async def test_a_taker_that_waits_for_words_hears_that_nobody_wants_the_request(
    giver: Giver,
) -> None:
    """A master that has lost the taker cancels at us alone."""
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5, "stop"))
    await until("the words", lambda: giver.relay._takers)
    giver.relay.cancel("a")
    await until("the cancel", lambda: taker.downs)
    assert taker.downs[0].cancels.request_ids == ["a"]
    assert giver.relay.num_open == 0
    giver.relay.cancel("a")  # and once only


async def test_the_taker_of_an_attempt_before_hears_that_nobody_wants_it(giver: Giver) -> None:
    """The next attempt may come to us sooner than the cancel of the last one."""
    giver.relay.open("a", MASTER, attempt=1)
    taker = Taker(giver)
    taker.say(("a", 1, 5, "stop"))
    await until("the words", lambda: giver.relay._takers)
    giver.relay.open("a", MASTER, attempt=2)
    await until("the cancel", lambda: taker.downs)
    cancels = taker.downs[0].cancels
    assert (cancels.request_ids, cancels.attempts) == (["a"], [1])
    assert giver.relay.num_open == 1
    giver.relay.open("a", MASTER, attempt=2)  # the same one again
    assert giver.relay.num_open == 1


async def test_a_cancel_before_the_taker_spoke_is_our_own(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    giver.generations.send(MASTER, outputs(("a", 0, 4)))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: entries(stream.sent))
    stream.answer(cancel("a"))
    await until("the cancel", lambda: giver.cancelled == ["a"])


async def test_a_request_is_closed_by_the_acknowledgement_of_its_finish_only(
    giver: Giver,
) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: entries(stream.sent))
    stream.answer(ack("a", 2))
    await until("the word", lambda: taker.downs)
    assert giver.relay.num_open == 1
    taker.say(("a", 2, 6, "length"))
    await until("the finish", lambda: len(entries(stream.sent)) == 2)
    stream.answer(ack("a", 3))
    await until("the end", lambda: giver.relay.num_open == 0)
    assert taker.acks() == [("a", 2), ("a", 3)]


async def test_what_nobody_here_knows_is_cancelled_at_the_taker(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("lost", 4, 9), ("a", 1, 5))
    await until("the cancel", lambda: taker.downs)
    assert taker.downs[0].cancels.request_ids == ["lost"]
    stream = await giver.network.stream("master:1")
    await until("the other's entry", lambda: entries(stream.sent))


async def test_late_words_on_closed_requests_leave_nothing_behind(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: entries(stream.sent))
    giver.relay.close("a")
    taker.say(("a", 2, 6), ("never known", 3, 7, "stop"))
    await until("the cancel", lambda: taker.downs)
    assert sorted(taker.downs[0].cancels.request_ids) == ["a", "never known"]
    taker.leave()
    await until("the end of its stream", lambda: taker.ended)
    assert [name for name, held in vars(giver.relay).items() if held and name != "_clock"] == []


async def test_a_first_token_acknowledged_together_with_the_takers_is_forgotten(
    giver: Giver,
) -> None:
    """After a break the forwarded messages may overtake our own: the master then has both at once."""
    giver.relay.open("a", MASTER)
    giver.generations.send(MASTER, outputs(("a", 0, 4)))
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("both entries", lambda: len(entries(stream.sent)) == 2)
    stream.answer(ack("a", 2))
    await until("the word", lambda: taker.acks() == [("a", 2)])
    assert giver.generations.num_unacknowledged == 0


async def test_a_request_we_finished_ourselves_is_not_waited_for(giver: Giver) -> None:
    for name in ("a", "b", "c"):
        giver.relay.open(name, MASTER)
    giver.relay.on_own_outputs(outputs(("a", 0, 4, "length"), ("b", 0, 4), ("x", 0, 4, "stop")))
    giver.relay.on_own_outputs(outputs(("c", 0, -1, "no_decode_capacity")))
    assert giver.relay.num_open == 1


async def test_what_a_taker_said_is_not_waited_for_once_its_stream_has_ended(giver: Giver) -> None:
    for name in ("a", "b", "c"):
        giver.relay.open(name, MASTER)
    one, two = Taker(giver), Taker(giver, "ee")
    one.say(("a", 1, 5))
    two.say(("b", 1, 6))
    stream = await giver.network.stream("master:1")
    await until("both entries", lambda: len(entries(stream.sent)) == 2)
    one.leave()
    await until("the end of its stream", lambda: one.ended)
    assert giver.relay.num_open == 2


async def test_when_the_takers_stream_ends_its_words_are_ours_again(giver: Giver) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: entries(stream.sent))
    taker.leave()
    await until("the end of its stream", lambda: taker.ended)
    stream.answer(cancel("a"))
    await until("the cancel", lambda: giver.cancelled == ["a"])


async def test_a_stream_that_breaks_towards_the_master_sends_the_takers_straight_to_it(
    giver: Giver,
) -> None:
    """What was forwarded may be lost, and only D still has it: its stream ends here, so that it says it again."""
    giver.relay.open("a", MASTER)
    giver.relay.open("b", SECOND)
    concerned, other = Taker(giver), Taker(giver, "ee")
    concerned.say(("a", 1, 5, "stop"))
    other.say(("b", 1, 6))
    stream = await giver.network.stream("master:1")
    elsewhere = await giver.network.stream("master:2")
    await until("both", lambda: entries(stream.sent) and entries(elsewhere.sent))
    stream.cut()
    await until("the end of D's stream", lambda: concerned.ended)
    await settle()
    assert not other.ended
    other.say(("b", 2, 7))
    await until("the other's next entry", lambda: len(entries(elsewhere.sent)) == 2)


async def test_the_oldest_requests_are_forgotten_when_there_are_too_many(giver: Giver) -> None:
    for number in range(10_050):
        giver.relay.open(f"r{number}", MASTER)
    assert giver.relay.num_open == 10_000
    taker = Taker(giver)
    taker.say(("r49", 1, 1), ("r50", 1, 1))
    await until("the cancel", lambda: taker.downs)
    assert taker.downs[0].cancels.request_ids == ["r49"]


async def test_the_end_of_one_choice_ends_no_other(giver: Giver) -> None:
    giver.relay.open("a", MASTER, 2)
    taker = Taker(giver)
    taker.say(("a", 1, 5, "stop", 1))
    stream = await giver.network.stream("master:1")
    await until("the first end", lambda: entries(stream.sent))
    stream.answer(ack("a", 2, choice=1))
    await until("its acknowledgement", taker.acks)
    taker.say(("a", 1, 6), ("a", 2, 7, "length"))
    await until("the other choice", lambda: len(entries(stream.sent)) == 3)
    stream.answer(ack("a", 3))
    await until("both ends acknowledged", lambda: taker.acks() == [("a", 2), ("a", 3)])
    assert giver.relay.num_open == 0
    assert not [down for down in taker.downs if down.cancels.request_ids]


async def test_a_choice_that_ends_with_its_first_token_leaves_the_others_to_the_taker(
    giver: Giver,
) -> None:
    giver.relay.open("a", MASTER, 2)
    giver.relay.on_own_outputs(outputs(("a", 0, 5, "stop", 0), ("a", 0, 6, "", 1)))
    taker = Taker(giver)
    taker.say(("a", 1, 7, "length", 1))
    stream = await giver.network.stream("master:1")
    await until("the other choice", lambda: entries(stream.sent))
    stream.answer(ack("a", 2, choice=1))
    await until("its acknowledgement", taker.acks)
    assert giver.relay.num_open == 0


async def test_an_error_ends_all_choices_with_one_acknowledgement(giver: Giver) -> None:
    giver.relay.open("a", MASTER, 3)
    taker = Taker(giver)
    taker.say(("a", 1, -1, "deadline_exceeded", 1))
    stream = await giver.network.stream("master:1")
    await until("the error", lambda: entries(stream.sent))
    stream.answer(ack("a", 2, choice=1))
    await until("its acknowledgement", taker.acks)
    assert giver.relay.num_open == 0


def test_the_givers_own_error_ends_all_choices() -> None:
    relay = Relay(HandClock())
    relay.open("a", MASTER, 2)
    relay.on_own_outputs(outputs(("a", 0, 5, "stop", 0)))
    assert relay.num_open == 1
    relay.on_own_outputs(outputs(("a", 0, -1, "no_decode_capacity", 0)))
    assert relay.num_open == 0


def test_a_request_whose_taker_never_spoke_here_is_forgotten_at_its_deadline() -> None:
    clock = HandClock()
    relay = Relay(clock)
    relay.open("a", MASTER, timeout_s=5.0)
    clock.turn(4.9)
    relay.expire()
    assert relay.num_open == 1
    clock.turn(0.2)
    relay.expire()
    assert relay.num_open == 0


async def test_a_taker_that_spoke_hears_that_its_request_is_past_its_deadline(giver: Giver) -> None:
    giver.relay = Relay(clock := HandClock())
    giver.relay.open("a", MASTER, timeout_s=5.0)
    taker = Taker(giver)
    taker.say(("a", 1, 5, "stop"))
    stream = await giver.network.stream("master:1")
    await until("the entry", lambda: len(entries(stream.sent)) == 1)
    clock.turn(5.1)
    giver.relay.expire()  # the master's acknowledgement would come too late to be handed down
    await until("the word", lambda: taker.downs)
    assert taker.downs[0].cancels.request_ids == ["a"]
    assert giver.relay.num_open == 0


async def test_an_acknowledgement_of_earlier_entries_does_not_keep_back_that_of_the_finish(
    giver: Giver,
) -> None:
    giver.relay.open("a", MASTER)
    taker = Taker(giver)
    taker.say(("a", 1, 5))
    taker.say(("a", 2, 6, "length"))
    stream = await giver.network.stream("master:1")
    await until("both", lambda: len(entries(stream.sent)) == 2)
    stream.answer(ack("a", 2))  # of our own first token, which was told again
    await until("the first", lambda: len(taker.downs) == 1)
    assert giver.relay.num_open == 1
    stream.answer(ack("a", 3))
    await until("the second", lambda: len(taker.downs) == 2)
    assert giver.relay.num_open == 0
