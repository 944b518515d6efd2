"""What the gate runs: so many trials with a cluster of their own. Used by the test_trials files, one for each of two workers."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.campaign import run
from tests.faults.rows import ROWS

TRIALS = 30  # in each file
MARKS = [
    pytest.mark.etcd,
    pytest.mark.timeout(900),  # some two minutes alone on two cores
    pytest.mark.skipif(
        shutil.which("etcd") is None or shutil.which("etcdctl") is None,
        reason="no etcd and etcdctl on PATH",
    ),
]


def survives(seed: int) -> None:
    """Every row at least once; the faults have to hit."""
    told = run(TRIALS, seed=seed, rows=tuple(ROWS))
    assert set(told["rows"]) == set(ROWS)
    resumed = sum(count for attempt, count in told["attempts"].items() if attempt != 1)
    assert resumed >= TRIALS / 4, told
