"""The card in the registry, and the masters found there: put, changed, put again, taken away; told every beat."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.instance.support import FakeNetwork, settle, until
from tests.master.support import KEY
from xllm_py.base.clock import HandClock, RealClock
from xllm_py.base.errors import PeerUnavailable, RegistryUnavailable
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Card, Role, card_from_json, card_key
from xllm_py.cluster.service_info import ServiceRecord, service_to_json
from xllm_py.instance.announcer import Announcer
from xllm_py.instance.generations import Generations
from xllm_py.instance.masters import Masters
from xllm_py.registry.base import Lease
from xllm_py.registry.memory import MemoryRegistry, Store
from xllm_py.wire.control_messages import Heartbeat, HeartbeatReply


def card(state: str = "READY") -> Card:
    return Card(
        name="host:1",
        rpc_address="host:2",
        type=Role.PREFILL.value,
        incarnation_id="i",
        state=state,
    )


class House:
    def __init__(self) -> None:
        self.registry = MemoryRegistry(Store(RealClock()))
        self.tasks = TaskFamily("house")

    def announcer(self, registry: MemoryRegistry | None = None) -> Announcer:
        return Announcer(
            registry=registry or self.registry, cluster_key=KEY, ttl_s=5, tasks=self.tasks
        )

    async def state(self) -> str:
        raw = await self.registry.get(keys.instance(Role.PREFILL, "host:1"))
        return card_from_json(raw, card_key(KEY)).state if raw is not None else ""


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    await made.tasks.close()


# ---- announcer ----


async def test_a_card_is_put_signed_changed_and_taken_away(house: House) -> None:
    announcer = house.announcer()
    assert announcer.signed() == b""
    await announcer.announce(card())
    assert await house.state() == "READY"
    assert card_from_json(announcer.signed(), card_key(KEY)) == card()
    await announcer.announce(card("DRAINING"))
    assert await house.state() == "DRAINING"
    await announcer.withdraw()
    assert await house.state() == ""
    await announcer.withdraw()


async def test_a_vanished_card_is_put_again_once_however_many_masters_ask(house: House) -> None:
    announcer = house.announcer()
    await announcer.announce(card())
    await house.registry.delete(keys.instance(Role.PREFILL, "host:1"))
    for _ in range(5):
        announcer.put_again()
    assert house.tasks.size == 1
    await settle()
    assert await house.state() == "READY"


async def test_a_card_taken_away_stays_away_though_masters_miss_it(house: House) -> None:
    """Heartbeats go on until the very end, and each is answered with: unknown."""
    announcer = house.announcer()
    await announcer.announce(card("DRAINING"))
    await announcer.withdraw()
    announcer.put_again()
    await settle()
    assert await house.state() == ""


async def test_before_the_first_announcement_there_is_nothing_to_put_again(house: House) -> None:
    house.announcer().put_again()
    await settle()
    assert await house.state() == ""


class AwayRegistry(MemoryRegistry):
    """Refuses while it is away."""

    away = True

    async def lease(self, ttl_s: int) -> Lease:
        if self.away:
            raise RegistryUnavailable("etcd is away")
        return await super().lease(ttl_s)


async def test_a_registry_that_is_away_when_the_card_is_put_again_ends_nothing(
    house: House,
) -> None:
    registry = AwayRegistry(Store(RealClock()))
    announcer = house.announcer(registry)
    with pytest.raises(RegistryUnavailable):
        await announcer.announce(card())
    announcer.put_again()
    await settle()
    registry.away = False
    await announcer.announce(card())
    assert await registry.get(keys.instance(Role.PREFILL, "host:1"))


# ---- masters ----


class FakeClient:
    """A master's rpc port."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.beats: list[Heartbeat] = []
        self.known = True
        self.away = False
        self.closed = False

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        self.beats.append(beat)
        if self.away:
            raise PeerUnavailable("no answer")
        return HeartbeatReply(known=self.known)

    async def close(self) -> None:
        self.closed = True


class Beating:
    """Masters over fake clients and a memory registry."""

    def __init__(self, house: House) -> None:
        self.registry = house.registry
        self.clients: dict[str, FakeClient] = {}
        self.num_unknown = 0
        self.num_beats_when_unknown = 0  # the first time
        self.network = FakeNetwork()
        generations = Generations(
            name="host:1",
            incarnation="i",
            connect=self.network.connect,
            tasks=house.tasks,
            clock=HandClock(),
            on_cancel=lambda *_: None,
            on_relayed=lambda down: down,
            on_broken=lambda _: None,
            on_rerouted=lambda *_: None,
        )
        self.masters = Masters(
            cluster_key=KEY,
            client=self._client,  # type: ignore[arg-type]  # a fake
            beat=self._beat,
            interval_s=0.005,
            generations=generations,
            on_reply=self._on_reply,
            tasks=house.tasks,
        )
        house.tasks.start(self.masters.follow(house.registry), name="follow")

    def _client(self, address: str) -> FakeClient:
        return self.clients.setdefault(address, FakeClient(address))

    def _beat(self, sequence: int, cache_since: int) -> Heartbeat:
        return Heartbeat(
            name="host:1", incarnation="i", sequence=sequence, state="READY", role=Role.PREFILL
        )

    def _on_reply(self, reply: HeartbeatReply, sequence: int) -> None:
        if reply.known or not sequence:
            return
        self.num_unknown += 1
        if self.num_unknown == 1:
            self.num_beats_when_unknown = len(self.clients["one:1"].beats)

    async def put(self, name: str, address: str, key: bytes = KEY) -> None:
        record = ServiceRecord(name=name, rpc_address=address, http_address="", incarnation_id=name)
        await self.registry.put(f"{keys.SERVICES}{name}", service_to_json(record, key))

    async def beaten(self, address: str, count: int = 2) -> FakeClient:
        await until(
            f"{count} beats at {address}",
            lambda: address in self.clients and len(self.clients[address].beats) >= count,
        )
        return self.clients[address]


async def test_every_master_is_told_and_gets_a_stream(house: House) -> None:
    beating = Beating(house)
    await beating.put("one", "one:1")
    await beating.put("two", "two:1")
    for address in ("one:1", "two:1"):
        client = await beating.beaten(address, 3)
        numbers = [beat.sequence for beat in client.beats]
        assert numbers == list(range(len(numbers)))
        await beating.network.stream(address)


async def test_a_master_that_goes_is_told_no_more(house: House) -> None:
    beating = Beating(house)
    await beating.put("one", "one:1")
    client = await beating.beaten("one:1")
    await beating.registry.delete(f"{keys.SERVICES}one")
    client.away = True
    await until("the client to be closed", lambda: client.closed)


async def test_a_master_that_answers_is_told_on_though_etcd_lost_its_record(house: House) -> None:
    """An etcd that was away longer than the lease returns without the record, until the master has put it again."""
    beating = Beating(house)
    await beating.put("one", "one:1")
    client = await beating.beaten("one:1")
    await beating.registry.delete(f"{keys.SERVICES}one")
    await settle()
    await beating.beaten("one:1", len(client.beats) + 3)
    await beating.put("one", "one:1")
    await settle()
    client.away = True
    await beating.beaten("one:1", len(client.beats) + 3)
    numbers = [beat.sequence for beat in client.beats]
    assert numbers == list(range(len(numbers)))
    assert not client.closed


async def test_a_master_that_moves_is_told_at_its_new_address(house: House) -> None:
    beating = Beating(house)
    await beating.put("one", "old:1")
    old = await beating.beaten("old:1")
    await beating.put("one", "new:1")
    await beating.beaten("new:1")
    await until("the old client to be closed", lambda: old.closed)


async def test_a_record_under_another_key_is_passed_over(house: House) -> None:
    beating = Beating(house)
    await beating.put("forged", "evil:1", b"x" * 32)
    await beating.registry.put(f"{keys.SERVICES}broken", b"not json")
    await beating.put("one", "one:1")
    await beating.beaten("one:1")
    assert list(beating.clients) == ["one:1"]


async def test_a_master_that_does_not_answer_is_told_again_until_it_does(house: House) -> None:
    beating = Beating(house)
    beating.clients["one:1"] = FakeClient("one:1")
    beating.clients["one:1"].away = True
    await beating.put("one", "one:1")
    client = await beating.beaten("one:1", 3)
    assert beating.num_unknown == 0
    client.away = False
    client.known = False
    await until("the card to be asked for", lambda: beating.num_unknown)


async def test_the_first_beat_may_come_before_the_card_is_seen(house: House) -> None:
    beating = Beating(house)
    beating.clients["one:1"] = FakeClient("one:1")
    beating.clients["one:1"].known = False
    await beating.put("one", "one:1")
    await until("the card to be asked for", lambda: beating.num_unknown)
    assert beating.num_beats_when_unknown == 2
