"""Many seeds in one test: runs them, and says of the first that goes wrong how to repeat it. Used by the test_seeds files."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from tests.sim.run import run, simulating

SEEDS_A_TEST = 250
FILES = 2  # that share the seeds, for two workers


def of_file(config: pytest.Config, number: int) -> Iterator[range]:
    """The part of the seeds that one file runs, a range for each test."""
    only = config.getoption("--sim-seed")
    first = config.getoption("--sim-first") if only is None else only
    count = config.getoption("--sim-seeds") if only is None else 1
    starts = range(first, first + count, SEEDS_A_TEST)
    for start in starts[number::FILES]:
        yield range(start, min(start + SEEDS_A_TEST, first + count))


def run_all(seeds: Iterable[int]) -> Counter[str]:
    """How the requests ended. Fails with the first seed that goes wrong and the command that repeats it."""
    ends: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # a world is a knot of its own; what is older needs no look
    gc.disable()
    try:
        with simulating():
            for seed in seeds:
                ends.update(_run(seed).values())
                gc.collect()  # each: a heap that stays small stays in the processor's cache
    finally:
        gc.enable()
        gc.unfreeze()
    return ends


def _run(seed: int) -> dict[str, str]:
    try:
        return run(seed).ends
    except Exception as error:
        text = f"seed {seed}: {error!r}\nrepeat it with: pytest tests/sim --sim-seed {seed}"
        raise AssertionError(text) from error
