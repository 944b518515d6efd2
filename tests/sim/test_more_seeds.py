"""Whole clusters, the other half of the seeds of test_seeds. `--sim-seeds N --sim-first S` runs others."""

from __future__ import annotations

import pytest

from tests.sim.seeds import of_file, run_all


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parts = list(of_file(metafunc.config, 1))
    metafunc.parametrize("seeds", parts, ids=[f"{part[0]}-{part[-1]}" for part in parts])


def test_every_request_ends_once_and_right_and_nothing_is_left(seeds: range) -> None:
    ends = run_all(seeds)
    assert len(seeds) < 100 or ends["ok"] > sum(ends.values()) / 2, ends
