"""Duties: one half always done by somebody, moves only under lasting pressure, and a word of an old master changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.cluster import duties
from xllm_py.cluster.duties import (
    COOL_S,
    DRAIN_S,
    HIGH,
    HOLD_S,
    LOW,
    Duties,
    Duty,
    Fence,
    Half,
    Move,
    Standing,
)
from xllm_py.cluster.instance_info import Card, Role


def standing(
    name: str,
    role: Role = Role.MIX,
    *,
    duty: Role | None = None,
    flexible: bool = False,
    settled: bool = True,
    by_hand: bool = False,
    idle: bool = True,
    prefill: float = 0.0,
    decode: float = 0.0,
) -> Standing:
    card = Card(name=name, rpc_address="", type=role.value, incarnation_id=name, flexible=flexible)
    given = None
    if duty is not None:
        given = Duty(role=duty, term=1, epoch=1, settled=settled, by_hand=by_hand)
    return Standing(card=card, duty=given, idle=idle, prefill=prefill, decode=decode)


def after(standings: list[Standing], moves: list[Move]) -> list[Standing]:
    """As the instances are when they were told."""
    changed = {
        move.key: Duty(role=move.role, term=1, epoch=2, settled=move.settled, by_hand=move.by_hand)
        for move in moves
    }
    return [dataclasses.replace(each, duty=changed.get(each.key, each.duty)) for each in standings]


# ---- pressure


PRESSED = [standing("a", prefill=HIGH), standing("b", prefill=HIGH), standing("c", prefill=HIGH)]


def test_lasting_pressure_of_prompts_makes_one_that_does_both_a_prefill_instance() -> None:
    machine = Duties()
    assert machine.look(PRESSED, 0.0) == []
    assert machine.look(PRESSED, HOLD_S - 0.1) == []
    (move,) = machine.look(PRESSED, HOLD_S)
    assert (move.key, move.role, move.cause) == ("a", Role.PREFILL, "pressure")
    told = after(PRESSED, [move])
    for second in range(int(COOL_S)):
        assert machine.look(told, HOLD_S + second) == []
    (second,) = machine.look(told, HOLD_S + COOL_S)
    assert (second.key, second.role) == ("b", Role.PREFILL)
    told = after(told, [second])
    assert machine.look(told, HOLD_S + 3 * COOL_S) == []  # c is the last that decodes


def test_pressure_that_comes_and_goes_moves_nobody() -> None:
    machine = Duties()
    calm = [dataclasses.replace(each, prefill=LOW) for each in PRESSED]
    for second in range(60):
        assert machine.look(PRESSED if second % 3 else calm, float(second)) == []


def test_nobody_moves_while_the_other_side_has_no_room_either() -> None:
    machine = Duties()
    both = [dataclasses.replace(each, decode=LOW + 0.01) for each in PRESSED]
    for second in range(60):
        assert machine.look(both, float(second)) == []


@pytest.mark.parametrize("half", list(Half))
def test_the_least_busy_of_the_other_side_helps_where_roles_are_flexible(half: Half) -> None:
    own, other = (Role.PREFILL, Role.DECODE)[:: 1 if half is Half.PREFILL else -1]
    pressed, light, lighter = {half.value: HIGH}, 0.3, 0.2
    standings = [
        standing("p", own, flexible=True, **pressed),  # type: ignore[arg-type]  # numbers
        standing("d1", other, flexible=True, **{half.other.value: light}),  # type: ignore[arg-type]
        standing("d2", other, flexible=True, **{half.other.value: lighter}),  # type: ignore[arg-type]
        standing("d3", other),
    ]
    machine = Duties()
    machine.look(standings, 0.0)
    (move,) = machine.look(standings, HOLD_S)
    assert (move.key, move.role) == ("d2", own)


def test_who_was_set_by_hand_is_left_alone_by_pressure() -> None:
    standings = [
        standing("a", duty=Role.MIX, by_hand=True, prefill=HIGH),
        standing("b", Role.DECODE),
    ]
    machine = Duties()
    for second in range(60):
        assert machine.look(standings, float(second)) == []


# ---- drain


def test_a_busy_one_is_drained_first_and_then_settled() -> None:
    busy = [dataclasses.replace(PRESSED[0], idle=False), *PRESSED[1:]]
    busy[1] = dataclasses.replace(busy[1], decode=0.4, idle=False)
    busy[2] = dataclasses.replace(busy[2], decode=0.4, idle=False)
    machine = Duties()
    machine.look(busy, 0.0)
    (move,) = machine.look(busy, HOLD_S)
    assert (move.key, move.settled) == ("a", False)
    told = after(busy, [move])
    assert duties.halves(told[0].card, told[0].duty) == frozenset()
    assert machine.look(told, HOLD_S + 1) == []
    empty = [dataclasses.replace(told[0], idle=True), *told[1:]]
    (settled,) = machine.look(empty, HOLD_S + 1.1)
    assert (settled.key, settled.role, settled.settled) == ("a", Role.PREFILL, True)


def test_what_does_not_end_is_not_waited_for_without_end() -> None:
    told = [
        standing("a", duty=Role.PREFILL, settled=False, idle=False),
        standing("b", duty=Role.MIX),
    ]
    machine = Duties()
    assert machine.look(told, 5.0) == []
    assert machine.look(told, 5.0 + DRAIN_S - 0.1) == []
    (move,) = machine.look(told, 5.0 + DRAIN_S)
    assert (move.key, move.settled, move.cause) == ("a", True, "settled")


# ---- always both halves


def test_the_last_of_a_half_that_goes_is_replaced_at_once_also_by_one_set_by_hand() -> None:
    standings = [
        standing("a", duty=Role.PREFILL, by_hand=True, prefill=0.9),
        standing("b", duty=Role.PREFILL, by_hand=True, prefill=0.1),
    ]
    (move,) = Duties().look(standings, 0.0)
    assert (move.key, move.role, move.settled, move.cause) == ("b", Role.DECODE, True, "needed")
    (alone,) = Duties().look(standings[:1], 0.0)
    assert (alone.key, alone.role) == ("a", Role.MIX)


def test_fixed_roles_are_not_touched() -> None:
    assert Duties().look([standing("a", Role.PREFILL), standing("b", Role.DEFAULT)], 0.0) == []


def test_by_hand_only_while_the_others_do_the_other_half() -> None:
    pair = [standing("a"), standing("b")]
    move = duties.by_hand(pair, "a", Role.PREFILL)
    assert move is not None
    assert (move.role, move.settled, move.by_hand) == (Role.PREFILL, True, True)
    told = after(pair, [move])
    assert duties.by_hand(told, "b", Role.PREFILL) is None
    assert duties.by_hand(told, "b", Role.DECODE) is not None
    busy = [dataclasses.replace(each, idle=False) for each in pair]
    drained = duties.by_hand(busy, "a", Role.DECODE)
    assert drained is not None
    assert not drained.settled
    both = duties.by_hand(busy, "a", Role.MIX)
    assert both is not None
    assert both.settled


@given(data=st.data())
def test_whatever_happens_each_half_is_taken_by_somebody_who_can(data: st.DataObject) -> None:
    """Random instances, loads, deaths and hands over some minutes: two looks after anything, both halves are taken where that is possible."""
    roles = st.sampled_from([Role.MIX, Role.PREFILL, Role.DECODE])
    standings = [
        standing(f"i{n}", data.draw(roles), flexible=data.draw(st.booleans()))
        for n in range(data.draw(st.integers(1, 5)))
    ]
    machine, now = Duties(), 0.0
    pressures = st.sampled_from([0.0, 0.4, 0.7, 1.5])
    for _ in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.sampled_from([0.25, 4.0, 35.0]))
        standings = [
            dataclasses.replace(
                each,
                prefill=data.draw(pressures),
                decode=data.draw(pressures),
                idle=data.draw(st.booleans()),
            )
            for each in standings
        ]
        if len(standings) > 1 and data.draw(st.integers(0, 9)) == 0:
            standings.pop(data.draw(st.integers(0, len(standings) - 1)))
        if data.draw(st.integers(0, 9)) == 0:
            key = data.draw(st.sampled_from([each.key for each in standings]))
            hand = duties.by_hand(standings, key, data.draw(roles))
            if hand is not None and duties.movable(
                next(each.card for each in standings if each.key == key)
            ):
                standings = after(standings, [hand])
        for _ in range(2):
            standings = after(standings, machine.look(standings, now))
        able = {half for each in standings for half in duties.abilities(each.card)}
        taken = {half for each in standings for half in duties.halves(each.card, each.duty)}
        assert taken == able
        for each in standings:
            assert duties.movable(each.card) or each.duty is None


# ---- the fence at the instance


NUMBERS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(words=st.lists(st.tuples(st.integers(0, 4), st.none() | NUMBERS), max_size=30))
def test_an_instance_takes_only_later_words(
    words: list[tuple[int, tuple[int, int] | None]],
) -> None:
    fence = Fence()
    for term, number in words:
        before, highest = fence.duty, fence.term
        duty = Duty(role=Role.PREFILL, term=number[0], epoch=number[1]) if number else None
        taken = fence.hear(term, duty)
        assert fence.term == max(term, highest)
        assert taken == (fence.duty is not before)
        if taken:
            assert duty is not None
            assert fence.duty == duty
            assert duty.term == term >= highest
            assert before is None or duty.number > before.number
