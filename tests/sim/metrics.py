"""A cheap stand-in for Metrics: making real ones anew for each world takes time, and a simulation wants to count some things itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from xllm_py.base.metrics import Metrics


class _Child:
    """A counter, gauge or histogram with or without label values."""

    def __init__(self, tally: Tally, name: str) -> None:
        self._tally, self._name = tally, name

    def labels(self, *values: object, **named: object) -> _Child:
        return _Child(self._tally, " ".join(map(str, (self._name, *values, *named.values()))))

    def inc(self, amount: float = 1) -> None:
        """Counts."""
        self._tally.counts[self._name] += amount

    def set(self, _value: object) -> None:
        """Of a gauge; not kept."""

    observe = set_function = set

    def clear(self) -> None:
        """Of a gauge; not kept."""


class Tally:
    """In the place of base.metrics.Metrics; counters by name and label values."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def counter(self, name: str, _text: str, _labels: Sequence[str] = ()) -> Any:
        return _Child(self, name)

    gauge = seconds = counter

    def as_metrics(self) -> Metrics:
        """For a component that takes Metrics."""
        return cast("Metrics", self)
