"""What a failed attempt means for the next one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_py.cluster.attempts import (
    AFTER_LOSS_S,
    LOST,
    MOST_PAUSE_S,
    NO_ROOM,
    REFUSED_S,
    TOGETHER_S,
    Again,
    Attempts,
    Failure,
    GiveUp,
    Quarantine,
)

P, D, E = "p", "d", "e"
CODES = sorted(LOST | NO_ROOM | {"internal_error"})


def lost(*who: str) -> Failure:
    return Failure("instance_lost", "lost", frozenset(who))


def full(*who: str) -> Failure:
    return Failure("no_decode_capacity", "full", frozenset(who))


def attempts(most: int = 3, patience_s: float = 10.0) -> Attempts:
    return Attempts(most=most, patience_s=patience_s)


def test_a_lost_attempt_is_followed_at_once_by_one_elsewhere_until_there_were_too_many() -> None:
    it = attempts()
    assert it.on_failed(lost(D), 1.0) == Again(0.0)
    assert (it.number, it.passed_over) == (2, {D})
    assert it.on_failed(lost(E), 2.0) == Again(0.0)
    assert (it.number, it.passed_over) == (3, {D, E})
    verdict = it.on_failed(lost(P), 3.0)
    assert isinstance(verdict, GiveUp)
    assert verdict.code == "instance_lost"


def test_who_lost_it_is_asked_again_when_nobody_else_is_left_and_the_second_time_not_soon() -> None:
    """So that a moment's trouble of the only pair, in which each attempt says a token, does not cost them all."""
    it, pauses = attempts(), []
    for now in (1.0, 2.0):
        it.on_taken()
        assert it.on_failed(lost(D), now) == Again(0.0)
        again = it.on_failed(Failure("no_instances"), now)
        assert isinstance(again, Again)
        pauses.append(again.pause_s)
        assert it.passed_over == frozenset()
    assert tuple(pauses) == AFTER_LOSS_S


def test_who_has_no_room_is_passed_over_and_when_nobody_is_left_all_are_asked_again_after_a_pause() -> (
    None
):
    it = attempts(most=1)
    assert it.on_failed(full(D), 1.0) == Again(0.0)
    assert it.on_failed(full(E), 1.0) == Again(0.0)
    assert it.passed_over == {D, E}
    pause = it.on_failed(Failure("no_instances"), 1.0)
    assert isinstance(pause, Again)
    assert pause.pause_s > 0
    assert (it.number, it.passed_over) == (3, frozenset())


def test_one_that_came_back_is_better_than_none() -> None:
    it = attempts()
    it.on_failed(lost(D), 1.0)
    it.on_failed(Failure("no_instances"), 1.0)
    assert it.passed_over == frozenset()


def test_one_that_is_tried_again_and_is_still_away_is_no_further_loss_but_costs_patience() -> None:
    it = attempts(patience_s=2.0)
    it.on_failed(lost(D), 1.0)
    it.on_failed(Failure("no_instances"), 1.0)
    assert isinstance(it.on_failed(lost(D), 1.1), Again)
    assert (it.num_lost, it.number, it.passed_over) == (1, 3, {D})
    assert it.on_failed(lost(D), 3.0) == GiveUp("instance_lost", "lost")
    it = attempts()
    for now in (1.0, 2.0):
        it.on_failed(lost(D), now)
        it.on_taken()  # it came back, and loses it anew
    assert isinstance(it.on_failed(lost(D), 3.0), GiveUp)


def test_patience_ends_with_the_refusal_of_an_instance_not_with_the_lack_of_others() -> None:
    it = attempts(patience_s=2.0)
    it.on_failed(full(D), 1.0)
    for now in (1.0, 1.5, 2.9):
        assert isinstance(it.on_failed(Failure("no_instances"), now), Again)
    assert it.on_failed(Failure("no_instances"), 3.0) == GiveUp("no_decode_capacity", "full")


def test_patience_begins_anew_once_somebody_took_it() -> None:
    it = attempts(patience_s=2.0)
    it.on_failed(full(D), 1.0)
    it.on_taken()
    assert isinstance(it.on_failed(full(D), 9.0), Again)
    assert isinstance(it.on_failed(full(D), 10.5), Again)
    assert isinstance(it.on_failed(full(D), 11.0), GiveUp)


def test_without_patience_the_first_refusal_is_the_last() -> None:
    assert attempts(patience_s=0.0).on_failed(full(D), 5.0) == GiveUp("no_decode_capacity", "full")


def test_what_is_the_requests_own_fault_is_not_tried_again() -> None:
    verdict = attempts().on_failed(Failure("invalid_value", "no"), 0.0)
    assert verdict == GiveUp("invalid_value", "no")


def test_a_second_death_makes_a_request_suspect() -> None:
    it = attempts(most=9)
    it.on_death(1.0, spoke=True)
    assert isinstance(it.on_failed(lost(D), 1.0), Again)
    it.on_death(1.01 + TOGETHER_S, spoke=False)
    verdict = it.on_failed(lost(P), 1.5)
    assert isinstance(verdict, GiveUp)
    assert verdict.code == "request_quarantined"


def test_deaths_at_once_and_deaths_of_instances_that_could_compute_it_do_not() -> None:
    it = attempts(most=9)
    it.on_death(1.0, spoke=False)
    it.on_death(1.0 + 0.9 * TOGETHER_S, spoke=False)
    it.on_death(5.0, spoke=True)
    assert not it.deadly
    it.on_death(9.0, spoke=False)
    assert it.deadly


def test_a_third_death_is_no_chance_however_soon_it_comes() -> None:
    it = attempts(most=9)
    for _ in range(2):
        it.on_death(1.0, spoke=False)
    assert not it.deadly
    it.on_death(1.0, spoke=False)
    assert it.deadly
    other = attempts(most=9)
    for spoke in (False, False, True, False):
        other.on_death(1.0, spoke=spoke)
    assert not other.deadly, "the third could compute it"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(CODES),
            st.frozensets(st.sampled_from((P, D, E))),
            st.floats(0, 0.5),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.integers(1, 4),
    st.sampled_from((0.0, 0.5, 2.0)),
)
def test_it_always_ends_and_never_turns_without_a_pause(
    steps: list[tuple[str, frozenset[str], float, bool]], most: int, patience_s: float
) -> None:
    """However it fails: numbers only grow, losses are bounded, and between two pauses each instance is asked once at most."""
    it = attempts(most=most, patience_s=patience_s)
    now, number, at_once = 0.0, 1, 0
    for code, who, later_s, taken in steps:
        now += later_s
        if taken:
            it.on_taken()
        verdict = it.on_failed(Failure(code, "", who), now)
        if isinstance(verdict, GiveUp):
            assert it.num_lost <= most
            return
        assert code in LOST | NO_ROOM
        assert 0 <= verdict.pause_s <= MOST_PAUSE_S
        assert it.number in (number, number + 1)
        assert it.num_lost < most
        number = it.number
        at_once = 0 if verdict.pause_s else at_once + 1
        assert at_once <= 3 + most


def test_a_quarantined_fingerprint_is_refused_for_a_while() -> None:
    ward = Quarantine()
    assert not ward.refuses(b"a", 0.0)
    ward.add(b"a", 0.0)
    ward.add(b"b", 100.0)
    assert ward.refuses(b"a", REFUSED_S - 1)
    assert not ward.refuses(b"a", REFUSED_S)
    assert ward.refuses(b"b", REFUSED_S)
    for number in range(2000):
        ward.add(number.to_bytes(2), 200.0)
    assert len(ward) == 1000
