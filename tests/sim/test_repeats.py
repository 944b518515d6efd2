"""A seed's story is the same whenever and wherever it is told: else a seed that fails could not be looked at again."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.sim.run import run, simulating

SEEDS = range(0, 120, 7)
_TELL = f"""
from tests.sim.run import run, simulating
with simulating():
    for seed in {SEEDS!r}:
        print(seed, run(seed).digest())
"""


def digests(hash_seed: str) -> list[str]:
    """Of a process of its own."""
    told = subprocess.run(
        [sys.executable, "-c", _TELL],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return told.stdout.splitlines()


def test_two_processes_with_other_hashes_tell_the_same_story() -> None:
    one, other = digests("1"), digests("2")
    assert len(one) == len(SEEDS)
    assert one == other


def test_a_process_that_has_run_other_seeds_tells_the_same_story() -> None:
    with simulating():
        first = run(4).digest()
        run(5)
        assert run(4).digest() == first
        assert run(6).digest() != first
