"""Prometheus metrics behind three verbs, so that one module knows the library.

A daemon makes one `Metrics`; components ask it for counters, gauges and histograms by name and keep the child they use.
Names are snake case with the unit last and get the prefix `xllm_` here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Children(defaultdict[str, Callable[[], None]]):
    """Label value -> the child's verb, made on first use: to look a child up costs as much as to count. Values come from closed lists only."""

    def __init__(self, make: Callable[[str], Callable[[], None]]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> Callable[[], None]:
        self[key] = made = self._make(key)
        return made


class Metrics:
    """One process's metrics."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows; Prometheus appends `_total`."""
        return Counter(f"xllm_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A number that goes up and down."""
        return Gauge(f"xllm_{name}", text, labels, registry=self._registry)

    def seconds(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        """A histogram of durations in seconds."""
        return Histogram(f"xllm_{name}", text, labels, registry=self._registry, buckets=SECONDS)

    def text(self) -> bytes:
        """Everything, in Prometheus' text form."""
        return generate_latest(self._registry)
