"""The gate: so many faults of every kind, and every answer is what it would have been. More by scripts/faults."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.campaign import run
from tests.faults.rows import ROWS

TRIALS = 60


@pytest.mark.etcd
@pytest.mark.timeout(900)  # some four minutes alone on two cores
@pytest.mark.skipif(
    shutil.which("etcd") is None or shutil.which("etcdctl") is None,
    reason="no etcd and etcdctl on PATH",
)
def test_every_answer_survives_every_fault() -> None:
    told = run(TRIALS, seed=1, rows=tuple(ROWS))
    assert set(told["rows"]) == set(ROWS)
    resumed = sum(count for attempt, count in told["attempts"].items() if attempt > 1)
    assert resumed >= TRIALS / 4, told  # the faults hit
