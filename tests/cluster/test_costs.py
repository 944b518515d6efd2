"""Lines fitted to what was seen, and the work that waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.cluster.costs import Costs, Line, Typical


@given(st.floats(0, 1), st.floats(0, 0.01))
def test_a_line_finds_what_made_it(a: float, b: float) -> None:
    line = Line([(0.0, 0.5), (100.0, 0.5)])
    for turn in range(300):
        x = float(turn * 37 % 101)
        line.observe(x, a + b * x)
    for x in (0.0, 50.0, 100.0):
        assert line.predict(x) == pytest.approx(a + b * x, abs=0.02 * (a + 100 * b) + 1e-4)


def test_a_line_follows_a_machine_that_gets_slower() -> None:
    line = Line([(0.0, 0.1), (100.0, 0.2)])
    for speed in (1.0, 3.0):
        for turn in range(150):
            x = float(turn * 37 % 101)
            line.observe(x, speed * (0.1 + 0.001 * x))
    assert line.predict(50.0) == pytest.approx(0.45, rel=0.05)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e3)), max_size=30))
def test_whatever_is_seen_predictions_are_no_less_than_nothing(
    seen: list[tuple[float, float]],
) -> None:
    line = Line([(0.0, 0.02), (1000.0, 0.5)])
    for x, y in seen:
        line.observe(x, y)
    assert line.predict(0.0) >= 0
    assert line.predict(1e4) >= line.predict(10.0) >= 0


def test_the_chance_of_a_limit_grows_with_it() -> None:
    line = Line([(0.0, 0.1), (100.0, 0.2)])
    for turn in range(60):
        line.observe(50.0, 0.15 + 0.02 * (turn % 2))
    chances = [line.chance(50.0, limit) for limit in (0.05, 0.155, 0.165, 0.5)]
    assert chances == sorted(chances)
    assert chances[0] < 0.01
    assert chances[-1] > 0.99


def test_what_was_placed_counts_at_once_and_until_its_first_token() -> None:
    costs = Costs()
    empty = costs.first_token_s(100)
    costs.enqueue("a", 1000)
    costs.enqueue("b", 500)
    costs.enqueue("b", 600)  # another attempt of the same
    assert costs.tokens_ahead == 1600
    assert costs.first_token_s(100) > empty
    costs.dequeue("a")
    costs.dequeue("a")
    costs.dequeue("b")
    assert costs.tokens_ahead == 0


def test_what_an_instance_reports_beyond_our_own_is_other_masters() -> None:
    costs = Costs()
    costs.enqueue("a", 100)
    costs.decode(1)
    costs.decode(1)
    costs.report(1, 2, 50, 100)  # ours
    assert (costs.tokens_ahead, costs.rows) == (100, 2)
    costs.report(4, 5, 50, 100)
    assert costs.rows == 4
    assert costs.tokens_ahead == 100 + 4 * 100
    assert costs.kv_usage == 0.5


def test_who_has_shown_nothing_is_believed_to_be_like_the_others() -> None:
    """Else requests would go for ever to those that were tried first, when all are faster than the guess."""
    typical = Typical()
    busy, idle = Costs(typical), Costs(typical)
    for _ in range(20):
        busy.observe_first_token(1000, 0.07)
        busy.observe_first_token(100, 0.014)
        busy.observe_token(0.012)
    idle.report(0, 0, 10, 10)
    assert idle.first_token_s(1000) == pytest.approx(busy.first_token_s(1000), rel=0.2)
    assert idle.token_s == pytest.approx(busy.token_s, rel=0.2)
    for _ in range(30):
        idle.observe_first_token(1000, 0.3)
    assert idle.first_token_s(1000) > 2 * busy.first_token_s(1000)
