"""The other half of the gate, for the other worker."""

from __future__ import annotations

from tests.faults.gate import MARKS, survives

pytestmark = MARKS


def test_every_answer_survives_every_fault() -> None:
    survives(seed=2)
