"""The gate: so many faults of every kind, and every answer is what it would have been. More by scripts/faults."""

from __future__ import annotations

from tests.faults.gate import MARKS, survives

pytestmark = MARKS


def test_every_answer_survives_every_fault() -> None:
    survives(seed=1)
