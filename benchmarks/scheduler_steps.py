"""What does planning one step cost, in microseconds, when 1, 32 or 256 requests decode?

    python -m benchmarks.scheduler_steps [--rounds 7] [--sequences 1 32 256]

No model and no processes: the scheduler of one engine, given made-up tokens. `schedule_us` is the plan, `apply_us` taking in
the result and handing the outputs over, `pipe_us` sending them to the API process (typed msgpack through a socketpair),
`message_us` making and serialising the message of the step that goes to the master. Means over all steps of a round, so that
steps in which requests get a new block count; a round's figures are one sample. One JSON line per row.

The floors: planning and taking in, together, take at most 150 us at 256 requests and 1,200 us at 2,048.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from typing import Any

from benchmarks.report import emit, summary
from xllm_py.control.convert_streams import from_up
from xllm_py.core.config import ModelFacts, SchedulerConfig
from xllm_py.core.plan import Outputs, StepPlan, StepResult
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.scheduler import Scheduler
from xllm_py.transport.pipe import EnginePipe
from xllm_py.wire.control_messages import GenerationsUp
from xllm_py.wire.messages import Stepped

# microseconds of schedule and apply together, by number of requests
FLOORS_US = {256: 150.0, 2048: 1200.0}
BLOCK_TOKENS = 128
PROMPT_TOKENS = 512
STEPS_OF_ONE = (
    4000  # of a round at one sequence; fewer when there are more, but at least two blocks of each
)
VOCAB_SIZE = 150_000
EOS = VOCAB_SIZE - 1


class Decoding:
    """So many requests in the middle of their answers, and nothing else."""

    def __init__(self, num_sequences: int, num_steps: int) -> None:
        longest = PROMPT_TOKENS + num_steps + 1
        blocks = -(-longest // BLOCK_TOKENS) * num_sequences
        config = SchedulerConfig(
            max_seqs_per_batch=num_sequences,
            max_tokens_per_batch=num_sequences * PROMPT_TOKENS,  # all prompts in the first step
            prefill_usage_threshold=1.0,
        )
        facts = ModelFacts(vocab_size=VOCAB_SIZE, max_model_len=longest, eos_token_ids=(EOS,))
        self.scheduler = Scheduler(config, facts, blocks, BLOCK_TOKENS)
        self.now = 0.0
        for index in range(num_sequences):
            self.scheduler.add(_submission(index, num_steps + 1), self.now)
        self.step()

    def step(self) -> Outputs:
        """One step outside the measurement."""
        self.now += 0.01
        plan = self.scheduler.schedule(self.now)
        self.scheduler.apply(plan, result_of(plan), self.now)
        return self.scheduler.take_outputs()


def _submission(index: int, max_tokens: int) -> Submission:
    return Submission(
        request_id=f"cmpl-{index:024x}",
        prompt_ids=tuple((index + at) % EOS for at in range(PROMPT_TOKENS)),
        sampling=SamplingParams(
            max_tokens=max_tokens, temperature=0.0, seed=index, stop_token_ids=(7, 11)
        ),
        timeout_s=1e6,
    )


def result_of(plan: StepPlan) -> StepResult:
    """A token for every row that is due one; never an end token or a stop token."""
    rows = zip(plan.rows, plan.sample, strict=True)
    return StepResult(token_ids=[100 + row for row, due in rows if due])


class Wires:
    """Both ways the outputs of a step go."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self._pipe = EnginePipe(ours)

    def pipe(self, outputs: Outputs) -> None:
        """Engine process to API process."""
        self._pipe.send(Stepped(outputs=outputs))

    def drain(self) -> None:
        """Take what was sent, outside the measurement."""
        self._theirs.recv(1 << 20)

    @staticmethod
    def message(outputs: Outputs) -> bytes:
        """Instance to master: the bytes of the step's message."""
        up = GenerationsUp(name="127.0.0.1:9000", incarnation="d-1", sequence=1, outputs=outputs)
        return from_up(up).SerializeToString()

    def close(self) -> None:
        """Both ends."""
        self._pipe.close()
        self._theirs.close()


def run_round(num_sequences: int, num_steps: int) -> dict[str, float]:
    """Mean microseconds per step of each part."""
    decoding, wires = Decoding(num_sequences, num_steps), Wires()
    scheduler = decoding.scheduler
    spent = dict.fromkeys(("schedule_us", "apply_us", "pipe_us", "message_us"), 0.0)

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        value = work(*arguments)
        spent[part] += time.perf_counter() - began
        return value

    def take(plan: StepPlan, result: StepResult) -> Outputs:
        scheduler.apply(plan, result, decoding.now)
        return scheduler.take_outputs()

    for _ in range(num_steps - 1):
        decoding.now += 0.01
        plan = timed("schedule_us", scheduler.schedule, decoding.now)
        outputs = timed("apply_us", take, plan, result_of(plan))
        if len(outputs.token_ids) != num_sequences or any(outputs.finish_reasons):
            raise SystemExit(f"not {num_sequences} decoding requests: {outputs}")
        timed("pipe_us", wires.pipe, outputs)
        wires.drain()
        timed("message_us", wires.message, outputs)
    wires.close()
    if set(decoding.step().finish_reasons) != {"length"}:
        raise SystemExit("the answers do not end where they should")
    scheduler.assert_empty()
    return {part: seconds / (num_steps - 1) * 1e6 for part, seconds in spent.items()}


def main() -> None:
    """Rounds take turns over the sizes, after one that does not count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    options = parser.parse_args()
    steps = {count: max(2 * BLOCK_TOKENS, STEPS_OF_ONE // count) for count in options.sequences}
    samples: dict[int, list[dict[str, float]]] = {count: [] for count in options.sequences}
    for number in range(options.rounds + 1):
        for count in options.sequences:
            measured = run_round(count, steps[count])
            if number:
                samples[count].append(measured)
    for count, rounds in samples.items():
        parts = {part: summary([each[part] for each in rounds]) for part in rounds[0]}
        settings = {"sequences": count, "steps": steps[count], "block_size": BLOCK_TOKENS}
        kept: dict[str, Any] = {}
        if count in FLOORS_US:
            together = sum(parts[part]["median"] for part in ("schedule_us", "apply_us"))
            kept = {"floor_us": FLOORS_US[count], "kept": together <= FLOORS_US[count]}
        emit("scheduler_steps", settings, {**parts, **kept})


if __name__ == "__main__":
    main()
