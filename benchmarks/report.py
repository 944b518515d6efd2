"""The one JSON line a benchmark prints: what, settings, commit, machine, medians and spread."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of at least one sample, to four digits."""
    return {
        "median": float(f"{statistics.median(samples):.4g}"),
        "min": float(f"{min(samples):.4g}"),
        "max": float(f"{max(samples):.4g}"),
        "rounds": len(samples),
    }


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def commit() -> str:
    """Short id of the checked-out commit, with `+` when files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def emit(what: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Print the line; `load` is that of the last minute, the benchmark's own included."""
    machine = f"{platform.machine()} {os.cpu_count()} cores"
    where = {"commit": commit(), "machine": machine, "load": round(os.getloadavg()[0], 1)}
    line = {"what": what, **settings, **results, **where}
    print(json.dumps(line), flush=True)
