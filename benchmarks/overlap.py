"""What beginning a step ahead hides: the host's work between two steps, when a device computes apart from it.

    python -m benchmarks.overlap [--rounds 7] [--sequences 1 32 256] [--device-ms 2]

No model and no device: what stands for one takes each step of decodes for so long, one after the other, whatever the host does meanwhile, as a
GPU's stream does. The host schedules, takes results in and sends the outputs through a pipe, as the engine's loop does. Milliseconds a step
with --enable_schedule_overlap and without it, rounds in turn, and how much of what the host added is hidden. One JSON line per row.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from typing import Any

from benchmarks.report import emit, summary
from benchmarks.scheduler_steps import Decoding, Wires, result_of
from xllm_py.core.executor import Finish
from xllm_py.core.plan import StepPlan

STEPS = 120  # of a round; within a block, so that no request needs a new one at another moment


class Stream:
    """A device of one queue."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._free_at = 0.0

    def begin(self, plan: StepPlan) -> Finish:
        """Its work begins when that before it is done."""
        self._free_at = done_at = max(time.perf_counter(), self._free_at) + self._step_s
        result = result_of(plan)

        def finish() -> Any:
            while time.perf_counter() < done_at:
                pass
            return result

        return finish


def step_ms(sequences: int, device_ms: float, wires: Wires, *, overlaps: bool) -> float:
    """Of one round."""
    decoding, stream = Decoding(sequences, STEPS + 2), Stream(device_ms / 1000)
    scheduler, under_way = decoding.scheduler, deque[tuple[StepPlan, Finish]]()
    began = time.perf_counter()
    for _ in range(STEPS):
        decoding.now += 0.01
        if not under_way:
            plan = scheduler.schedule(decoding.now)
            under_way.append((plan, stream.begin(plan)))
        ahead = scheduler.schedule_ahead(decoding.now) if overlaps else None
        if ahead is not None:
            under_way.append((ahead, stream.begin(ahead)))
        plan, finish = under_way.popleft()
        scheduler.apply(plan, finish(), decoding.now)
        wires.pipe(scheduler.take_outputs())
        wires.drain()
    return 1000 * (time.perf_counter() - began) / STEPS


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--device-ms", type=float, default=2.0)
    options = parser.parse_args()
    wires = Wires()
    for sequences in options.sequences:
        found: dict[str, list[float]] = {"in_turn_ms": [], "ahead_ms": []}
        for turn in range(options.rounds + 1):
            for name, overlaps in (("in_turn_ms", False), ("ahead_ms", True)):
                spent = step_ms(sequences, options.device_ms, wires, overlaps=overlaps)
                if turn:  # the first warms up
                    found[name].append(spent)
        figures: dict[str, Any] = {name: summary(values) for name, values in found.items()}
        host = figures["in_turn_ms"]["median"] - options.device_ms
        left = figures["ahead_ms"]["median"] - options.device_ms
        settings = {"sequences": sequences, "device_ms": options.device_ms}
        emit("steps begun ahead", settings, {**figures, "hidden": round(1 - left / host, 3)})
    wires.close()


if __name__ == "__main__":
    main()
