"""Which candidates win: by average, ties by index, none generated last."""

from __future__ import annotations

import pytest

from xllm_py.openai.ranking import Score, ranked


def scores(*pairs):
    return [Score(total=total, num_tokens=num) for total, num in pairs]


@pytest.mark.parametrize(
    ("given", "n", "expected"),
    [
        (scores((-4, 2), (-3, 3), (-5, 1)), 2, [1, 0]),
        (scores((-4, 2), (-3, 3), (-5, 1)), 3, [1, 0, 2]),
        (scores((-2, 1), (-4, 2), (-1, 1)), 3, [2, 0, 1]),
        (scores((-1, 1), (-1, 1), (-1, 1)), 2, [0, 1]),
        (scores((0, 0), (-9999, 1)), 2, [1, 0]),
        (scores((0, 0), (0, 0)), 1, [0]),
        (scores((0, 1), (0, 0)), 2, [0, 1]),
    ],
)
def test_the_likeliest_on_average_win(given, n, expected):
    assert ranked(given, n) == expected
