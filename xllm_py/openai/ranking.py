"""Which candidates of best_of are shown: those whose tokens were the likeliest on average (SPEC 6.8). Pure.

Called by `generation` when best_of is above n, on sums that were made token by token from the log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one candidate: the sum of its tokens' logprobs, and how many tokens it has."""

    total: float
    num_tokens: int

    @property
    def average(self) -> float:
        """Mean logprob of a token; of a candidate without tokens the lowest there is."""
        return self.total / self.num_tokens if self.num_tokens else -math.inf


def ranked(scores: Sequence[Score], n: int) -> list[int]:
    """Indices of the n best candidates, the best first; of equal ones the lower index first."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index].average, index))
    return order[:n]
