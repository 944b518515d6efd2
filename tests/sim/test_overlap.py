"""Whole clusters whose engines begin a step of decodes before the one before it is taken in."""

from __future__ import annotations

import pytest

from tests.sim.script import OVERLAPS_FROM
from tests.sim.seeds import SEEDS_A_TEST, run_all
from xllm_py.core.scheduler import Scheduler


def test_every_request_ends_once_and_right_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine, ahead = Scheduler.schedule_ahead, [0]

    def counted(self: Scheduler, now: float) -> object:
        plan = genuine(self, now)
        ahead[0] += plan is not None
        return plan

    monkeypatch.setattr(Scheduler, "schedule_ahead", counted)
    ends = run_all(range(OVERLAPS_FROM, OVERLAPS_FROM + SEEDS_A_TEST))
    assert ends["ok"] > sum(ends.values()) / 2, ends
    assert ahead[0] > SEEDS_A_TEST
