"""Which master decides: one at a time, terms that only grow, none that is unsure of its lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tests.master.support import KEY, until
from xllm_py.base.clock import RealClock
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.service_info import ServiceRecord, service_to_json
from xllm_py.master.election import Election
from xllm_py.registry.memory import MemoryLease, MemoryRegistry, Store

TTL_S = 3.0


class Candidate:
    """A master that does nothing but stand."""

    def __init__(self, store: Store, address: str, seen: Callable[[], int]) -> None:
        self.registry = MemoryRegistry(store)
        self.tasks = TaskFamily(address)
        self.address = address
        self.election = Election(
            address=address, cluster_key=KEY, seen_by_instances=seen, metrics=Metrics()
        )
        self.lease: MemoryLease

    async def start(self) -> Candidate:
        lease = await self.registry.lease(int(TTL_S))
        assert isinstance(lease, MemoryLease)
        self.lease = lease
        record = ServiceRecord(
            name=self.address,
            rpc_address=self.address,
            http_address="http-" + self.address,
            incarnation_id=self.address,
        )
        await lease.put(keys.service(self.address), service_to_json(record, KEY))
        self.tasks.start(self.election.follow(self.registry), name="follow")
        self.tasks.start(self.election.stand(self.registry, lease, TTL_S), name="stand")
        return self

    async def die(self) -> None:
        await self.tasks.close()
        await self.lease.revoke()


class Polls:
    def __init__(self) -> None:
        self.store = Store(RealClock())
        self.seen = 0
        self.all: list[Candidate] = []

    async def candidate(self, address: str) -> Candidate:
        made = await Candidate(self.store, address, lambda: self.seen).start()
        self.all.append(made)
        return made

    def leaders(self) -> list[str]:
        return [each.address for each in self.all if each.election.leads]

    def written(self) -> int:
        record = self.store.records[keys.TERM.encode()]
        return int(record.value or b"0")


@pytest.fixture
async def polls() -> AsyncIterator[Polls]:
    made = Polls()
    yield made
    for each in made.all:
        await each.tasks.close()


async def test_one_is_elected_and_all_know_whom_to_ask(polls: Polls) -> None:
    for name in ("a:1", "b:1", "c:1"):
        await polls.candidate(name)
    (leader,) = await until("a leader", polls.leaders)
    await until("all to know", lambda: all(c.election.leader == leader for c in polls.all))
    assert polls.written() == 1
    assert {c.election.leader_http for c in polls.all} == {"http-" + leader}
    assert {c.election.known_term for c in polls.all} == {1}


async def test_another_one_takes_over_with_a_higher_term_when_it_dies(polls: Polls) -> None:
    first = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    await polls.candidate("b:1")
    await first.die()
    assert await until("another", lambda: polls.leaders() == ["b:1"])
    assert polls.written() == 2


async def test_terms_grow_past_what_instances_saw_though_the_registry_forgot(polls: Polls) -> None:
    polls.seen = 41
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    assert leader.election.term == 42
    polls.store.delete([keys.ELECTED_MASTER.encode(), keys.TERM.encode()])
    await until("it to stand again", lambda: leader.election.leads and leader.election.term == 43)
    assert polls.written() == 43


async def test_who_is_outrun_acts_no_more_and_raises_its_term(polls: Polls) -> None:
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    polls.seen = 7
    assert not leader.election.leads
    await until("a later term", lambda: leader.election.leads)
    assert (leader.election.term, polls.written()) == (8, 8)


async def test_who_is_unsure_of_its_lease_acts_no_more(polls: Polls) -> None:
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    leader.lease.left_s = TTL_S / 3
    assert not leader.election.leads
    leader.lease.left_s = TTL_S
    assert leader.election.leads


async def test_a_key_that_somebody_else_wrote_deposes(polls: Polls) -> None:
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    polls.store.put(keys.ELECTED_MASTER.encode(), b"z:1")
    await until("it to see that", lambda: not leader.election.leads)
    await asyncio.sleep(0.05)
    assert leader.election.leader == "z:1"
    assert leader.election.leader_http == ""


async def test_a_term_that_is_no_number_counts_as_none(polls: Polls) -> None:
    polls.store.put(keys.TERM.encode(), b"many")
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    assert leader.election.term == 1


async def test_an_earlier_life_s_claim_is_claimed_anew(polls: Polls) -> None:
    polls.store.put(keys.ELECTED_MASTER.encode(), b"a:1")
    polls.store.put(keys.TERM.encode(), b"5")
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    assert leader.election.term == 6


async def test_a_registry_that_is_away_is_waited_for(polls: Polls) -> None:
    leader = await polls.candidate("a:1")
    await until("a leader", polls.leaders)
    leader.registry.up = False
    polls.store.delete([keys.ELECTED_MASTER.encode()])
    await until("it to see that", lambda: not leader.election.leads)
    leader.registry.up = True
    await until("it to be elected", lambda: leader.election.leads)
    assert leader.election.term == 2
