"""What clients saw, in figures: TTFT, TPOT, ITL and E2E, throughput, and goodput under limits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http_stream import Answer
from benchmarks.open_loop import Load
from benchmarks.report import percentile


@dataclass(frozen=True)
class Limits:
    """What a request may take, in seconds; infinity: anything."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    e2e_s: float = float("inf")

    def met(self, answer: Answer) -> bool:
        """Whether the answer kept all of them."""
        return (
            answer.ttft <= self.ttft_s and answer.tpot <= self.tpot_s and answer.e2e <= self.e2e_s
        )

    @staticmethod
    def read(words: Sequence[str]) -> Limits:
        """`ttft:200 tpot:50 e2e:3000`, in milliseconds. Raises ValueError with the word that is wrong."""
        found: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition(":")
            if name not in ("ttft", "tpot", "e2e") or not value:
                raise ValueError(f"{word}: a limit is ttft:MS, tpot:MS or e2e:MS")
            found[f"{name}_s"] = float(value) / 1e3
        return Limits(**found)


def attainment(load: Load, limits: Limits) -> float:
    """The share of all requests that ended well within the limits."""
    return sum(map(limits.met, load.good)) / len(load.answers) if load.answers else 0.0


def milliseconds(samples: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of seconds."""
    figures = {"mean": statistics.fmean(samples)}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        figures[name] = percentile(samples, share)
    return {name: float(f"{value * 1e3:.4g}") for name, value in figures.items()}


def latencies(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of answers that ended well; at least one."""
    return {
        "ttft_ms": milliseconds([answer.ttft for answer in answers]),
        "tpot_ms": milliseconds([answer.tpot for answer in answers]),
        "itl_ms": milliseconds([gap for answer in answers for gap in answer.gaps] or [0.0]),
        "e2e_ms": milliseconds([answer.e2e for answer in answers]),
    }


def figures_of(load: Load, limits: Limits) -> dict[str, Any]:
    """One row of a load."""
    good = load.good
    kept = attainment(load, limits)
    return {
        "requests": len(load.answers),
        "failed": len(load.failed),
        **(latencies(good) if good else {}),
        "requests_s": float(f"{len(good) / load.seconds:.4g}"),
        "tokens_s": float(f"{sum(each.num_tokens for each in good) / load.seconds:.4g}"),
        "attainment": float(f"{kept:.4g}"),
        "goodput_s": float(f"{kept * len(load.answers) / load.seconds:.4g}"),
    }
