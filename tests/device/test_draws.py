"""What stays of a distribution, against sorting it whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.device.draws import keep_most, keep_share

# quarters add up without rounding, and many weigh the same
QUARTERS = st.lists(st.integers(0, 4), min_size=1, max_size=40).filter(any)


def in_order(weights: np.ndarray) -> list[int]:
    """Ids by weight descending, then by id."""
    return sorted(range(len(weights)), key=lambda token: (-weights[token], token))


def only(weights: np.ndarray, kept: list[int]) -> list[float]:
    return [float(weights[token]) if token in kept else 0.0 for token in range(len(weights))]


@given(quarters=QUARTERS, most=st.integers(1, 50))
def test_the_most_likely_stay_and_of_equals_those_with_lower_ids(
    quarters: list[int], most: int
) -> None:
    weights = np.array(quarters) / 4
    wanted = only(weights, in_order(weights)[:most])
    keep_most(weights, most)
    assert weights.tolist() == wanted


@given(quarters=QUARTERS, sixteenths=st.integers(1, 16))
def test_the_one_that_reaches_the_share_is_the_last_to_stay(
    quarters: list[int], sixteenths: int
) -> None:
    weights, share = np.array(quarters) / 4, sixteenths / 16
    kept: list[int] = []
    mass = 0.0
    for token in in_order(weights):
        if mass >= share * weights.sum():
            break
        kept.append(token)
        mass += float(weights[token])
    wanted = only(weights, kept)
    keep_share(weights, share)
    assert weights.tolist() == wanted


def test_a_flat_and_a_steep_distribution_of_a_whole_vocabulary() -> None:
    rng = np.random.default_rng(5)
    for spread in (0.01, 1.0, 30.0):
        logits = rng.normal(size=50_000) * spread
        weights = np.exp(logits - logits.max())
        order = in_order(weights)
        ladder = weights[order].cumsum()
        kept = int(np.searchsorted(ladder, 0.7 * ladder[-1])) + 1
        keep_share(weights, 0.7)
        assert abs(np.count_nonzero(weights) - kept) <= 1  # the two sums round differently
        assert set(np.flatnonzero(weights)) <= set(order[: kept + 1])
        keep_most(weights, 3)
        assert set(np.flatnonzero(weights)) == set(order[: min(3, kept)])
