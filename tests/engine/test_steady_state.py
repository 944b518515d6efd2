"""In steady state a step leaves nothing on the heap but what the requests themselves keep: their tokens and the names of full blocks."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.engine.rig import Rig

ROWS, WARM, STEPS = 8, 64, 256
# a token in two lists, its share of a block's hash and of a table; measured: 62
MOST_BYTES_A_TOKEN = 150


def test_decode_steps_leave_only_their_tokens_behind(tmp_path: Path) -> None:
    rig = Rig(make_checkpoint(tmp_path), prefix_root=b"root")
    rig.executor.worker.observer = None
    for row in range(ROWS):
        rig.add(f"r{row}", list(range(row, row + 20)), WARM + STEPS + 8)

    def run(count: int) -> None:
        for _ in range(count):
            now = rig.clock.turn(0.001)
            plan = rig.scheduler.schedule(now)
            rig.scheduler.apply(plan, rig.executor.execute(plan), now)
            assert len(rig.scheduler.take_outputs().request_ids) == ROWS

    run(WARM)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    run(STEPS)
    gc.collect()
    after, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / (ROWS * STEPS) < MOST_BYTES_A_TOKEN
    # what a step needs for itself it gives back
    assert most - after < 100_000
