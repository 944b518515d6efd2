"""What an instance does when it is called: nothing it was asked is lost, and nothing stays open for nobody."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tests.instance.support import (
    FakeNetwork,
    cancel,
    entries,
    outputs,
    settle,
    submission,
    until,
)
from xllm_py.base.clock import HandClock
from xllm_py.base.errors import (
    DeadlineExceeded,
    Draining,
    LayoutMismatch,
    ProtocolViolation,
    UnsupportedValue,
)
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card, Role, card_key, card_to_json
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Receiver, Submission
from xllm_py.instance.control_service import ControlService
from xllm_py.instance.engine_link import EngineLink
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination, Outlets
from xllm_py.instance.relay import Relay
from xllm_py.instance.token_logs import TokenLogs
from xllm_py.wire.control_messages import LinkHealth
from xllm_py.wire.messages import Probed

KEY = b"k" * 32
RECEIVER = Receiver(name="d", address="d:1", incarnation="dd")


class FakeEngine:
    """Notes commands; answers offers as the test says, when it says."""

    def __init__(self) -> None:
        self.submitted: list[Submission] = []
        self.aborted: list[tuple[str, int]] = []
        self.gone: list[str] = []
        self.refusals: dict[str, str] = {}
        self.answering = asyncio.Event()
        self.answering.set()
        self.error: Exception | None = None
        self.offered: list[Offer] = []
        self.fetches: list[bool] = []

    def submit(self, submission: Submission) -> None:
        self.submitted.append(submission)

    def abort(self, request_ids: list[str], attempts: list[int]) -> None:
        self.aborted += zip(request_ids, attempts, strict=True)

    def peer_gone(self, incarnation: str) -> None:
        self.gone.append(incarnation)

    async def offer(self, offers: list[Offer], *, timeout_s: float) -> list[OfferAnswer]:
        self.offered += offers
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        return [self._answer(offer.submission) for offer in offers]

    def _answer(self, given: Submission) -> OfferAnswer:
        refusal = self.refusals.get(given.request_id, "")
        grant = b"" if refusal else b"g" * 16
        return OfferAnswer(
            request_id=given.request_id,
            attempt=given.attempt,
            grant=grant,
            endpoints=() if refusal else ("d:26000",),
            refusal=refusal,
        )

    async def probe(
        self,
        endpoints: tuple[str, ...],
        incarnation: str,
        block_size: int,
        fetch: bool,
        *,
        timeout_s: float,
    ) -> Probed:
        assert (endpoints, incarnation, block_size) == (("d:26000",), "dd", 8)
        self.fetches.append(fetch)
        return Probed(call=1, works=True, round_trip_s=0.5, bytes_per_s=3.0)

    async def first_tokens(self, firsts: list[FirstToken], *, timeout_s: float) -> list[bool]:
        return [first.grant == b"g" * 16 for first in firsts]


def card(name: str = "d", incarnation: str = "dd", **fields: Any) -> Card:
    facts = {"dtype": "float32", "block_size": 16, "layout": "l", "addrs": ("d:26000",), **fields}
    return Card(
        name=name,
        rpc_address=f"{name}:1",
        type=Role.DECODE.value,
        incarnation_id=incarnation,
        **facts,
    )


class House:
    """The service and the rooms behind it."""

    def __init__(self, *, takes_handoffs: bool = True) -> None:
        self.engine = FakeEngine()
        self.network = FakeNetwork()
        self.tasks = TaskFamily("house")
        self.relay = Relay(HandClock())
        self.generations = Generations(
            name="d",
            incarnation="dd",
            connect=self.network.connect,
            tasks=self.tasks,
            clock=HandClock(),
            on_cancel=lambda request_ids, attempts: self.service.end(request_ids, attempts),
            on_relayed=self.relay.take,
            on_broken=self.relay.cut,
            on_rerouted=lambda request_ids, to: self.outlets.reroute(request_ids, to),
        )
        self.token_logs = TokenLogs(HandClock())
        self.outlets = Outlets(self.generations.send, self.token_logs)
        self.service = ControlService(
            engine=cast("EngineLink", self.engine),
            outlets=self.outlets,
            generations=self.generations,
            relay=self.relay,
            card=card,
            cluster_key=KEY,
            takes_handoffs=takes_handoffs,
            tasks=self.tasks,
            drain=self._drain,
            describe=self._describe,
            token_logs=self.token_logs,
        )

    async def _drain(self, timeout_s: float) -> None:
        self.service.draining = True

    async def _describe(self) -> dict[str, Any]:
        return {"state": "READY"}

    async def link(self, name: str = "p", incarnation: str = "pp", **fields: Any) -> None:
        raw = card_to_json(card(name, incarnation, **fields), card_key(KEY))
        await self.service.link_instance(raw)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    await made.tasks.close()


def offer(request_id: str, incarnation: str = "pp", **fields: Any) -> Offer:
    return Offer(
        submission=submission(request_id, receiver=RECEIVER, master="master:1", **fields),
        giver_name="p",
        giver_address="p:1",
        giver_incarnation=incarnation,
        model_fingerprint="m",
        layout_fingerprint="l",
        block_size=4,
    )


async def test_a_peer_is_probed_at_the_address_in_its_card(house: House) -> None:
    raw = card_to_json(card("d", "dd", addrs=("d:26000",), block_size=8), card_key(KEY))
    for fetch in (False, True):
        found = await house.service.probe_peer(raw, fetch)
        assert found == LinkHealth(works=True, round_trip_s=0.5, bytes_per_s=3.0)
    assert house.engine.fetches == [False, True]
    closed = await house.service.probe_peer(card_to_json(card(addrs=()), card_key(KEY)), False)
    assert (closed.works, closed.reason) == (False, "d has no KV port")


async def test_what_is_fetched_is_fetched_from_where_the_card_says(house: House) -> None:
    """An offer that names another place is not believed."""
    await house.link(addrs=("p:26000",))
    lie = dataclasses.replace(offer("a"), read_grant=b"r" * 16, endpoints=("elsewhere:1",))
    await house.service.add_new_requests([lie])
    (put,) = house.engine.offered
    assert (put.endpoints, put.read_grant) == (("p:26000",), b"r" * 16)


async def test_of_a_giver_with_several_engines_the_one_that_offers_is_fetched_from(
    house: House,
) -> None:
    ports = tuple(f"p:{port}" for port in range(1, 5))
    await house.link(addrs=ports, dp_size=2, tp_size=2)
    for named, believed in (
        (ports[2:], ports[2:]),
        (("p:3", "q:4"), ports[:2]),
        (("p:3",), ports[:2]),
        ((), ports[:2]),
    ):
        asked = dataclasses.replace(offer("a"), read_grant=b"r" * 16, endpoints=named)
        await house.service.add_new_requests([asked])
        assert (house.engine.offered[-1].endpoints, house.engine.offered[-1].num_ranks) == (
            believed,
            2,
        )


async def test_a_relayed_answer_is_for_the_life_of_the_giver_that_asked(house: House) -> None:
    """Its next life at the same address knows nothing of the request and would have it cancelled."""
    await house.link()
    await house.service.add_new_requests([offer("a", relay=True)])
    house.outlets.on_outputs(outputs(("a", 1, 5)))
    stream = await house.network.stream("p:1")
    assert (stream.kind, stream.addressee) == ("instance", "pp")


# ---- submissions ----


async def test_a_submission_reaches_the_engine_and_its_tokens_the_master(house: House) -> None:
    given = submission("a", master="master:1")
    await house.service.submit(given)
    assert house.engine.submitted == [given]
    house.outlets.on_outputs(outputs(("a", 0, 5)))
    stream = await house.network.stream("master:1")
    await until("the token", lambda: entries(stream.sent) == [("a", 0, 5)])


async def test_a_draining_instance_takes_no_submission(house: House) -> None:
    await house.service.drain("finish", 1.0)
    with pytest.raises(Draining):
        await house.service.submit(submission("a", master="master:1"))
    assert (house.engine.submitted, house.outlets.num_open) == ([], 0)


async def test_an_instance_without_handoffs_gives_nothing_away() -> None:
    house = House(takes_handoffs=False)
    with pytest.raises(UnsupportedValue, match="--enable_disagg_pd"):
        await house.service.submit(submission("a", master="master:1", receiver=RECEIVER))
    with pytest.raises(LayoutMismatch, match="--enable_disagg_pd"):
        await house.link()
    assert house.outlets.num_open == 0


async def test_a_relayed_submission_is_opened_in_the_relay(house: House) -> None:
    await house.service.submit(submission("a", master="master:1", receiver=RECEIVER, relay=True))
    await house.service.submit(submission("b", master="master:1", relay=True))
    assert house.relay.num_open == 1
    house.service.end(["a", "b"], [1, 1])
    assert (house.relay.num_open, house.outlets.num_open) == (0, 0)


# ---- offers ----


async def test_offers_of_a_giver_that_is_not_linked_are_refused_and_leave_nothing(
    house: House,
) -> None:
    await house.link()
    answers = await house.service.add_new_requests(
        [offer("a", "stranger"), offer("b"), offer("c", "stranger")]
    )
    assert [(each.request_id, each.refusal) for each in answers] == [
        ("a", "not_linked"),
        ("b", ""),
        ("c", "not_linked"),
    ]
    assert house.outlets.num_open == 1


async def test_a_refused_offer_leaves_no_outlet(house: House) -> None:
    await house.link()
    house.engine.refusals["a"] = "full_now"
    answers = await house.service.add_new_requests([offer("a"), offer("b")])
    assert [each.refusal for each in answers] == ["full_now", ""]
    assert not house.outlets.has("a")
    assert house.outlets.destination("b") == Destination("master:1")


async def test_tokens_of_a_relayed_offer_go_to_the_giver(house: House) -> None:
    await house.link()
    await house.service.add_new_requests([offer("a", relay=True)])
    assert house.outlets.destination("a") == Destination(
        "p:1", relay=True, master="master:1", incarnation="pp"
    )


async def test_a_giver_that_died_is_not_dialled_for_every_token(house: House) -> None:
    await house.link()
    await house.service.add_new_requests([offer("r1", relay=True)])
    house.outlets.on_outputs(outputs(("r1", 1, 5)))
    relayed = await house.network.stream("p:1")
    await until("the entry", lambda: entries(relayed.sent))
    house.network.away.add("p:1")
    relayed.cut()
    straight = await house.network.stream("master:1")
    for at in (2, 3, 4):
        house.outlets.on_outputs(outputs(("r1", at, 5)))
        await until("the entry", lambda at=at: ("r1", at, 5) in entries(straight.sent))
    assert house.network.to("p:1") == [relayed]
    assert house.network.to("master:1") == [straight]


async def test_unlinking_a_giver_sends_what_came_through_it_straight_to_the_master(
    house: House,
) -> None:
    await house.link()
    await house.service.add_new_requests([offer("r1", relay=True)])
    house.outlets.on_outputs(outputs(("r1", 1, 5)))
    relayed = await house.network.stream("p:1")
    await until("the entry", lambda: entries(relayed.sent))
    await house.service.unlink_instance("p", "pp")
    straight = await house.network.stream("master:1")
    house.outlets.on_outputs(outputs(("r1", 2, 6)))
    await until("both", lambda: entries(straight.sent) == [("r1", 1, 5), ("r1", 2, 6)])
    assert house.network.to("p:1") == [relayed]


async def test_a_late_offer_that_is_refused_does_not_silence_the_request_that_runs(
    house: House,
) -> None:
    await house.link()
    await house.service.submit(submission("a", master="master:2"))
    house.engine.refusals["a"] = "cancelled"
    await house.service.add_new_requests([offer("a")])
    house.outlets.on_outputs(outputs(("a", 0, 5)))
    stream = await house.network.stream("master:2")
    await until("the token", lambda: entries(stream.sent) == [("a", 0, 5)])


async def test_a_giver_that_hangs_up_before_the_answer_leaves_nothing_when_it_is_refused(
    house: House,
) -> None:
    await house.link()
    house.engine.refusals["a"] = "full_now"
    house.engine.answering.clear()
    call = house.tasks.start(
        house.service.add_new_requests([offer("a"), offer("b")]), name="the call"
    )
    await until("the question", lambda: house.engine.offered)
    call.cancel()
    await asyncio.wait([call])
    assert house.outlets.num_open == 2  # nobody knows yet; outputs would find their way
    house.engine.answering.set()
    await until("the refusal", lambda: not house.outlets.has("a"))
    assert house.outlets.has("b")


async def test_an_engine_that_never_answers_takes_the_offers_back(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await house.link()
    house.engine.error = DeadlineExceeded("the engine did not answer")
    with pytest.raises(DeadlineExceeded):
        await house.service.add_new_requests([offer("a"), offer("b", attempt=2)])
    assert house.outlets.num_open == 0
    assert sorted(house.engine.aborted) == [("a", 1), ("b", 2)]
    assert not [one for one in caplog.records if one.levelname == "ERROR"], "the giver hears it"


async def test_first_tokens_are_answered_by_the_engine(house: House) -> None:
    firsts = [
        FirstToken(request_id=name, attempt=1, grant=grant, token_ids=(1,))
        for name, grant in (("a", b"g" * 16), ("b", b"x" * 16))
    ]
    assert await house.service.first_generation(firsts) == [True, False]


# ---- links ----


async def test_a_card_that_differs_is_refused_naming_every_field(house: House) -> None:
    with pytest.raises(LayoutMismatch) as caught:
        await house.link(dtype="bfloat16", layout="other", block_size=128)
    assert "dtype differs: bfloat16 on p, float32 on d" in caught.value.message
    assert "layout differs: other on p, l on d" in caught.value.message
    assert "block_size" not in caught.value.message, "blocks of any size fit"
    assert house.service.links() == ()


async def test_a_card_under_another_key_links_nobody(house: House) -> None:
    with pytest.raises(ProtocolViolation):
        await house.service.link_instance(card_to_json(card("p", "pp"), card_key(b"x" * 32)))
    assert house.service.links() == ()


async def test_a_new_life_of_a_giver_ends_the_reservations_of_the_old_one(house: House) -> None:
    await house.link()
    await house.link()
    assert house.engine.gone == []
    await house.link(incarnation="pp2")
    assert house.engine.gone == ["pp"]
    assert [(each.peer, each.incarnation) for each in house.service.links()] == [("p", "pp2")]
    answers = await house.service.add_new_requests([offer("a")])
    assert answers[0].refusal == "not_linked"


async def test_unlinking_ends_the_givers_reservations_once(house: House) -> None:
    await house.link()
    await house.link("q", "qq")
    for _ in range(2):
        await house.service.unlink_instance("p", "pp")
    assert house.engine.gone == ["pp"]
    assert [each.peer for each in house.service.links()] == ["q"]


# ---- endings ----


async def test_a_cancel_forgets_the_request_everywhere_and_says_what_it_found(
    house: House,
) -> None:
    await house.service.submit(submission("a", master="master:1"))
    house.outlets.on_outputs(outputs(("a", 0, 5)))
    assert await house.service.cancel(["a", "late"], [1, 0], "client_closed") == [
        "open",
        "unknown",
    ]
    assert house.engine.aborted == [("a", 1), ("late", 0)]
    assert (house.outlets.num_open, house.generations.num_unacknowledged) == (0, 0)
    house.outlets.on_outputs(outputs(("a", 1, 6)))
    await settle()
    assert house.generations.num_unacknowledged == 0


async def test_a_masters_cancel_on_the_stream_ends_the_request(house: House) -> None:
    await house.service.submit(submission("a", master="master:1"))
    house.outlets.on_outputs(outputs(("a", 0, 5)))
    stream = await house.network.stream("master:1")
    await until("the token", lambda: entries(stream.sent))
    stream.answer(cancel("a"))
    await until("the abort", lambda: house.engine.aborted == [("a", 1)])
    assert (house.outlets.num_open, house.generations.num_unacknowledged) == (0, 0)


async def test_drain_tells_how_many_are_open(house: House) -> None:
    await house.service.submit(submission("a", master="master:1"))
    assert await house.service.drain("finish", 5.0) == 1
    assert await house.service.describe("") == {"state": "READY"}


async def test_a_first_token_is_remembered_once_the_engine_has_taken_it(house: House) -> None:
    await house.link()
    await house.service.add_new_requests([offer("a", stream_id="s")])
    for grant, ids in ((b"x" * 16, []), (b"g" * 16, [7])):
        first = FirstToken(request_id="a", attempt=1, grant=grant, token_ids=(7,))
        assert await house.service.first_generation([first]) == [bool(ids)]
        assert (await house.service.describe("s"))["ids"] == ids


async def test_another_master_hears_what_was_said_and_takes_over_only_what_nobody_listens_to(
    house: House,
) -> None:
    await house.service.submit(submission("a", master="master:1", stream_id="s", origin=b"o"))
    house.outlets.on_outputs(outputs(("a", 0, 5)))
    stream = await until(
        "the stream", lambda: house.network.streams[0:1] and house.network.streams[0]
    )
    assert await house.service.describe("s") == {"ids": [5], "origin": "bw=="}
    assert await house.service.describe("t") == {}
    assert house.outlets.num_open == 1
    stream.cut()
    await until("the break", lambda: house.generations.is_broken(Destination("master:1")))
    assert (await house.service.describe("s"))["ids"] == [5]
    assert house.engine.aborted == [("a", 1)]
    assert house.outlets.num_open == 0
    assert (await house.service.describe("s"))["ids"] == [5]  # another one may ask too


async def test_an_empty_step_opens_no_stream(house: House) -> None:
    house.outlets.on_outputs(Outputs())
    await settle()
    assert house.network.streams == []
