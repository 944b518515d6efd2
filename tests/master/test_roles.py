"""Duties given by the elected master: under pressure, by hand, and none by another one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.master.support import FakeInstance, RunningMaster, until
from xllm_py.base.errors import InvalidValue, NotLeader, RequestNotFound, RoleNeeded
from xllm_py.cluster import duties
from xllm_py.cluster.instance_info import Role


@pytest.fixture
async def master() -> AsyncIterator[RunningMaster]:
    running = RunningMaster()
    await running.start()
    yield running
    await running.stop()


async def mixed(master: RunningMaster, count: int) -> list[FakeInstance]:
    """MIX instances, all linked."""
    made = [await master.add(f"m{number}", Role.MIX) for number in range(count)]
    wanted = count * (count - 1)
    await until("all pairs", lambda: len(master.parts.links.linked()) == wanted)
    return made


def has_duty(instance: FakeInstance, role: Role) -> bool:
    duty = instance.fence.duty
    return duty is not None and duty.role is role and duty.settled


def givers(master: RunningMaster) -> set[str]:
    return {giver.card.name for giver, _ in master.parts.router.options().pairs}


def takers(master: RunningMaster) -> set[str]:
    return {each.card.name for each in master.parts.router.options().takers}


async def test_lasting_pressure_moves_an_instance_and_routing_follows(
    master: RunningMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "HOLD_S", 0.2)
    instances = await mixed(master, 3)
    await master.be_elected()
    assert (givers(master), takers(master)) == ({"m0", "m1", "m2"}, {"m0", "m1", "m2"})
    for each in instances:
        master.parts.router.costs(each.incarnation).enqueue("r", 1_000_000)
    await until("one to prefill only", lambda: takers(master) == {"m1", "m2"})
    assert has_duty(instances[0], Role.PREFILL)
    assert givers(master) == {"m0", "m1", "m2"}


async def test_by_hand_both_ways_and_back(master: RunningMaster) -> None:
    first, second = await mixed(master, 2)
    await master.be_elected()
    roles = master.parts.roles
    roles.set_by_hand("m0", Role.PREFILL)
    await until("its duty", lambda: has_duty(first, Role.PREFILL))
    with pytest.raises(RoleNeeded):
        roles.set_by_hand("m1", Role.PREFILL)
    roles.set_by_hand("m1", Role.DECODE)
    await until("its duty", lambda: has_duty(second, Role.DECODE))
    await until("the routes", lambda: (givers(master), takers(master)) == ({"m0"}, {"m1"}))
    duty = roles.set_by_hand("m1", None)
    assert (duty.role, duty.by_hand) == (Role.DECODE, False)
    await until("its freedom", lambda: second.fence.duty == duty)


async def test_the_last_of_a_half_that_dies_is_replaced(master: RunningMaster) -> None:
    first, second = await mixed(master, 2)
    third = await master.add("d", Role.DECODE, flexible=True)
    await until("all pairs", lambda: len(master.parts.links.linked()) == 6)
    await master.be_elected()
    for name, role in (("m0", Role.PREFILL), ("m1", Role.DECODE), ("d", Role.DECODE)):
        master.parts.roles.set_by_hand(name, role)
    await until("the routes", lambda: (givers(master), takers(master)) == ({"m0"}, {"m1", "d"}))
    await first.cut_stream()
    await until("the loss", lambda: master.state(first) == "GONE")
    await until(
        "a new one", lambda: has_duty(third, Role.PREFILL) or has_duty(second, Role.PREFILL)
    )
    await until("pairs", lambda: len(givers(master)) == 1 and len(takers(master)) == 1)


async def test_instances_of_another_model_are_no_help(master: RunningMaster) -> None:
    first, second = await mixed(master, 2)
    await master.add("other p", Role.PREFILL, model_fingerprint="another")
    await master.add("other d", Role.DECODE, model_fingerprint="another")
    await master.be_elected()
    master.parts.roles.set_by_hand("m0", Role.PREFILL)
    await until("its duty", lambda: has_duty(first, Role.PREFILL))
    with pytest.raises(RoleNeeded):
        master.parts.roles.set_by_hand("m1", Role.PREFILL)
    await second.cut_stream()
    await until("the loss", lambda: master.state(second) == "GONE")
    await until("both halves at the one that is left", lambda: has_duty(first, Role.MIX))


async def test_what_cannot_be_had_is_refused(master: RunningMaster) -> None:
    prefill, _ = await master.pair()
    roles = master.parts.roles
    with pytest.raises(NotLeader):
        roles.set_by_hand("p", Role.DECODE)
    await master.be_elected()
    with pytest.raises(InvalidValue, match="enable_flexible_role"):
        roles.set_by_hand("p", Role.DECODE)
    with pytest.raises(RequestNotFound):
        roles.set_by_hand("nobody", Role.DECODE)
    await until("our term to be known", lambda: prefill.fence.term == 1)
    assert prefill.fence.duty is None


async def test_who_is_deposed_orders_nothing_and_who_comes_after_goes_on(
    master: RunningMaster,
) -> None:
    first, _ = await mixed(master, 2)
    await master.be_elected()
    master.parts.roles.set_by_hand("m0", Role.PREFILL)
    await until("its duty", lambda: has_duty(first, Role.PREFILL))
    await until("all to know", lambda: master.parts.manager.highest_term == 1)
    first.fence.hear(5, None)  # another master was elected meanwhile
    await until("the news", lambda: master.parts.manager.highest_term == 5)
    await until("a later term", lambda: master.parts.election.leads)
    assert master.parts.election.term == 6
    assert has_duty(first, Role.PREFILL)
    duty = master.parts.roles.set_by_hand("m0", Role.MIX)
    assert duty.number == (6, 1)
    await until("the later duty", lambda: first.fence.duty == duty)
