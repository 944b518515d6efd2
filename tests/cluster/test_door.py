"""Who is let through next."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.cluster.door import RAISED_S, Door, Ticket, level_of


def door(most_waiting: int = 1000, most_tokens: int = 10**9) -> Door:
    return Door(most_waiting=most_waiting, most_tokens=most_tokens)


def ticket(tenant: str = "", tokens: int = 10, level: int = 2, since: float = 0.0) -> Ticket:
    return Ticket(tenant=tenant, tokens=tokens, level=level, since=since)


def order(it: Door, now: float = 0.0) -> list[Ticket]:
    found = []
    while (each := it.take(now)) is not None:
        found.append(each)
    return found


def test_first_come_first_served_among_equals() -> None:
    it = door()
    tickets = [ticket(since=float(n)) for n in range(5)]
    for each in tickets:
        it.enter(each)
    assert order(it, 5.0) == tickets


def test_priority_goes_first_and_offline_last() -> None:
    it = door()
    levels = [level_of(3, offline=True), level_of(3, offline=False), level_of(0, offline=False)]
    tickets = [ticket(level=level) for level in (*levels, level_of(1, offline=False))]
    for each in tickets:
        it.enter(each)
    assert order(it) == tickets[::-1]


def test_who_waits_long_enough_goes_before_a_higher_priority() -> None:
    it = door()
    old, young = ticket(level=3, since=0.0), ticket(level=2, since=RAISED_S)
    it.enter(young)
    it.enter(old)
    assert it.take(RAISED_S - 0.1) is young
    it.enter(young)
    assert it.take(2 * RAISED_S) is old


def test_tenants_share_by_tokens_however_many_requests_they_send() -> None:
    it = door()
    for n in range(300):
        it.enter(ticket("greedy", tokens=100, since=n / 1000))
    for n in range(30):
        it.enter(ticket("modest", tokens=100, since=n / 1000))
        it.enter(ticket("large", tokens=300, since=n / 1000))
    through: Counter[str] = Counter()
    for _ in range(70):
        each = it.take(0.0)
        assert each is not None
        through[each.tenant] += each.tokens
    assert max(through.values()) - min(through.values()) <= 300


def test_a_tenant_that_was_idle_has_no_credit() -> None:
    it = door()
    for n in range(100):
        it.enter(ticket("busy", since=n / 1000))
    for _ in range(50):
        it.take(0.0)
    for n in range(100):
        it.enter(ticket("fresh", since=0.5 + n / 1000))
    turns = Counter(each.tenant for each in (it.take(1.0) for _ in range(40)) if each)
    assert turns == {"busy": 20, "fresh": 20}


def test_room_is_bounded_in_requests_and_tokens_and_comes_back() -> None:
    it = door(most_waiting=2, most_tokens=50)
    one, other = ticket(tokens=20), ticket(tokens=30)
    assert it.has_room(50)
    assert not it.has_room(51)
    it.enter(one)
    assert not it.has_room(31)
    it.enter(other)
    assert not it.has_room(0)
    it.leave(one)
    it.leave(one)
    assert it.has_room(20)
    assert (len(it), it.tokens) == (1, 30)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(1, 6), st.booleans()),
        max_size=50,
    )
)
def test_everybody_who_stays_is_let_through_once(
    steps: list[tuple[str, int, int, bool]],
) -> None:
    it = door()
    staying = []
    for now, (tenant, tokens, level, leaves) in enumerate(steps):
        each = ticket(tenant, tokens, level, float(now))
        it.enter(each)
        if leaves:
            it.leave(each)
        else:
            staying.append(each)
    found = order(it, float(len(steps)))
    assert sorted(map(id, found)) == sorted(map(id, staying))
    assert (len(it), it.tokens, it._served) == (0, 0, {})


@pytest.mark.parametrize(("priority", "offline", "level"), [(0, False, 2), (1, True, 4)])
def test_levels(priority: int, offline: bool, level: int) -> None:
    assert level_of(priority, offline=offline) == level
