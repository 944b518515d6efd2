"""One decode step of an executor, timed."""

from __future__ import annotations

import time

from xllm_py.core.executor import Executor
from xllm_py.core.plan import RowStart, StepPlan


def decode_ms(
    executor: Executor, started: tuple[RowStart, ...], number: int, rows: int, num_computed: int
) -> float:
    """Milliseconds of a step that computes one token of each row, behind `num_computed`, and draws the next one, the `number`th."""
    plan = StepPlan(
        step=number,
        started=started,
        rows=list(range(rows)),
        num_tokens=[1] * rows,
        num_computed=[num_computed] * rows,
        token_ids=[(31 * row + number) % 1000 for row in range(rows)],
        sample=[1] * rows,
        positions=[number] * rows,
    )
    began = time.perf_counter()
    result = executor.execute(plan)
    seconds = time.perf_counter() - began
    if result.failed_rows:
        raise SystemExit(f"rows failed: {result.failed_rows}")
    return seconds * 1000
