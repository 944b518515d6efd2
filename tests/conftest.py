"""For the whole suite: what is skipped is named, one line each, so that nobody takes it for passed."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# speed is judged in benchmarks/ only; a busy machine is no failure
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After the results."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} SKIPPED")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"{report.nodeid}: {reason}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/sim runs."""
    group = parser.getgroup("simulation")
    group.addoption("--sim-seeds", type=int, default=5_000, help="how many seeds tests/sim runs")
    group.addoption("--sim-first", type=int, default=0, help="the first of them")
    group.addoption("--sim-seed", type=int, default=None, help="run this one only")
