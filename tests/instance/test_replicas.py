"""Several engines that look like one: who gets what, what is said of all, and that with real toy engines every text is that of a lone run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.instance.support import submission, until
from tests.instance.test_engine_link import TOY, first, offer
from xllm_py.base.clock import HandClock, RealClock
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.config import EngineConfig
from xllm_py.core.plan import Outputs
from xllm_py.core.request import Offer, OfferAnswer
from xllm_py.engine.toy import ToyExecutor, lone_answer
from xllm_py.instance import replicas
from xllm_py.instance.engine_link import EngineHandlers
from xllm_py.instance.replicas import Replicas, shares
from xllm_py.wire import messages as m


class FakeLink:
    """Implements EngineLink as far as Replicas asks; notes what it was told."""

    def __init__(self, *, handlers: EngineHandlers, **_: object) -> None:
        self.handlers = handlers
        self.progress = m.Progress()
        self.progress_at = 0.0
        self.down = ""
        self.told: list[Any] = []
        self.refuses = False
        self.pids = (1,)

    def say(self, at: float = 0.0, **fields: Any) -> None:
        self.progress, self.progress_at = m.Progress(**fields), at
        self.handlers.on_progress(self.progress)

    def submit(self, asked: Any) -> None:
        self.told.append(asked.request_id)

    def abort(self, request_ids: list[str], attempts: list[int]) -> None:
        self.told.append(("abort", *request_ids))

    def answer_offers(self, answers: list[OfferAnswer]) -> None:
        self.told.append(("answers", *(answer.request_id for answer in answers)))

    def first_taken(self, taken: m.FirstTaken) -> None:
        self.told.append(("taken", *taken.request_ids, *taken.accepted))

    async def offer(self, offers: list[Offer], *, timeout_s: float) -> list[OfferAnswer]:
        self.told.append(("offer", *(each.submission.request_id for each in offers)))
        refusal = "full_now" if self.refuses else ""
        return [
            OfferAnswer(request_id=each.submission.request_id, attempt=1, refusal=refusal)
            for each in offers
        ]

    async def first_tokens(self, firsts: list[Any], *, timeout_s: float) -> list[bool]:
        self.told.append(("firsts", *(each.request_id for each in firsts)))
        return [True] * len(firsts)

    async def ledger(self, *, timeout_s: float) -> dict[str, int]:
        return {"free": 3, "active": len(self.told)}


class House:
    """Two engines that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replicas, "EngineLink", FakeLink)
        self.heard: list[Any] = []
        self.engine = Replicas(
            2,
            handlers=EngineHandlers.of_none(self.heard.append),
            tasks=TaskFamily("house"),
            clock=HandClock(),
        )
        self.a, self.b = self.engine._links


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    return House(monkeypatch)


def test_a_request_goes_to_the_engine_with_the_least_to_do(house: Any) -> None:
    house.a.say(waiting=1, running=2)
    house.b.say(running=1)
    for name in ("1", "2", "3", "4"):
        house.engine.submit(submission(name))
    assert house.b.told[:2] == ["1", "2"], "what it was given counts before it says so"
    assert len(house.a.told) == len(house.b.told) - 2
    house.a.say(blocks={"free": 1, "cached": 1})
    house.b.say(blocks={"free": 1})
    house.engine.submit(submission("5"))
    assert house.a.told[-1] == "5", "of two with as much to do the one with more room"


async def test_what_is_said_of_an_offer_goes_where_it_was_granted(house: Any) -> None:
    await house.engine.offer([offer("x"), offer("y")], timeout_s=1.0)
    assert sorted([house.a.told[0], house.b.told[0]]) == [("offer", "x"), ("offer", "y")]
    home = {house.a.told[0][1]: house.a, house.b.told[0][1]: house.b}
    await house.engine.offer([offer("x")], timeout_s=1.0)
    assert home["x"].told[-1] == ("offer", "x"), "it is repeated where the grant is"
    assert await house.engine.first_tokens([first("y"), first("x")], timeout_s=1.0) == [True, True]
    assert home["x"].told[-1] == ("firsts", "x")
    assert home["y"].told[-1] == ("firsts", "y")


async def test_an_offer_that_was_refused_may_go_elsewhere(house: Any) -> None:
    house.a.say(running=1)
    house.b.refuses = True
    (answer,) = await house.engine.offer([offer("x")], timeout_s=1.0)
    assert answer.refusal == "full_now"
    house.b.say(running=2)
    (answer,) = await house.engine.offer([offer("x")], timeout_s=1.0)
    assert not answer.refusal
    assert house.a.told == [("offer", "x")]


def test_a_giver_hears_of_its_own_offers_only(house: Any) -> None:
    house.a.handlers.on_offers([offer("x")])
    house.b.handlers.on_offers([offer("y")])
    assert len(house.heard) == 2
    house.engine.answer_offers(
        [OfferAnswer(request_id=name, attempt=1, refusal="no") for name in ("y", "x")]
    )
    taken = m.FirstTaken(
        request_ids=["x", "y"], attempts=[1, 1], accepted=[True, False], reached=[True, True]
    )
    house.engine.first_taken(taken)
    assert house.a.told == [("answers", "x"), ("taken", "x", True)]
    assert house.b.told == [("answers", "y"), ("taken", "y", False)]
    house.engine.abort(["x"], [1])
    assert house.a.told[-1] == house.b.told[-1] == ("abort", "x")


def test_a_block_is_cached_while_one_of_them_has_it(house: Any) -> None:
    house.a.say(cached=[b"p", b"q"], steps=2, tokens=5, waiting=1, blocks={"free": 4})
    house.b.say(cached=[b"p"], steps=1, tokens=1, running=1, blocks={"free": 6})
    assert house.heard[-1].cached == []
    assert (house.heard[-1].steps, house.heard[-1].tokens) == (3, 6)
    assert (house.heard[-1].waiting, house.heard[-1].running) == (1, 1)
    assert house.heard[-1].blocks == {"free": 10}
    house.a.say(evicted=[b"p", b"q"])
    assert house.heard[-1].evicted == [b"q"]
    house.b.say(evicted=[b"p"])
    assert house.heard[-1].evicted == [b"p"]


async def test_one_that_hangs_or_is_down_shows(house: Any) -> None:
    house.a.say(at=5.0, running=1)
    house.b.say(at=9.0)
    assert house.engine.progress_at == 5.0
    house.a.say(at=6.0)
    assert house.engine.progress_at == 9.0
    house.b.down = "gone"
    assert house.engine.down == "gone"
    assert house.engine.pids == (1, 1)
    assert (await house.engine.ledger())["free"] == 6


def test_devices_ports_and_streams_are_shared_out() -> None:
    names = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    config = EngineConfig(devices=names, kv_port=7000, kv_port_may_move=False, kv_streams=2)
    one, two = shares(config, 2)
    assert (one.devices, two.devices) == (names[:2], names[2:])
    assert (one.kv_port, two.kv_port) == (7000, 7001)
    assert (one.kv_port_may_move, two.kv_port_may_move) == (False, True)
    assert (one.kv_first_stream, two.kv_first_stream) == (0, 2)
    assert one.cpu_threads >= 1


async def test_two_toy_engines_give_the_texts_of_one() -> None:
    tokens: dict[str, list[int]] = {}
    ends: list[str] = []

    def on_outputs(said: Outputs) -> None:
        for index, request_id in enumerate(said.request_ids):
            if said.token_ids[index] >= 0:
                tokens.setdefault(request_id, []).append(said.token_ids[index])
            if said.finish_reasons[index]:
                ends.append(request_id)

    handlers = EngineHandlers.of_none(lambda _: None)
    handlers = EngineHandlers(
        on_outputs=on_outputs,
        on_offers=handlers.on_offers,
        on_first_tokens=handlers.on_first_tokens,
        on_cancels=handlers.on_cancels,
        on_verdicts=handlers.on_verdicts,
        on_reservations_ended=handlers.on_reservations_ended,
        on_progress=handlers.on_progress,
    )
    tasks = TaskFamily("two")
    engine = Replicas(2, handlers=handlers, tasks=tasks, clock=RealClock())
    config = EngineConfig(
        executor="toy",
        devices=("cpu:0", "cpu:1"),
        cache=TOY.cache,
        scheduler=TOY.scheduler,
        log_level="error",
    )
    ready = await engine.start(config, timeout_s=60.0)
    try:
        assert ready.num_blocks == TOY.toy_num_blocks, "no request has more"
        for number in range(8):
            asked = submission(f"r{number}", prompt_ids=(number, 5), max_tokens=20, ignore_eos=True)
            engine.submit(asked)
        await until("eight ends", lambda: len(ends) == 8)
        for number in range(8):
            assert tokens[f"r{number}"] == lone_answer(ToyExecutor(TOY), [number, 5], 20)
        await until("progress", lambda: engine.progress.tokens == 160)
        assert all(link.progress.tokens == 80 for link in engine._links)
        counts = await engine.ledger()
        assert counts["requests_open"] == 0
        assert counts["free"] + counts["cached"] == 2 * TOY.toy_num_blocks
    finally:
        await engine.close()
        await tasks.close()
