"""Measures how long steps take on this instance and writes it down, for `scripts/plan`: `xllm --profile_steps=FILE`.

Steps of one prompt, of many sizes and behind contexts of many lengths, and steps of many decodes. Each is computed until it has been
timed three times, after one that does not count; the median stands in the file. Called by engine/__main__, when nobody owns a block.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import UsageError
from xllm_py.core.config import EngineConfig
from xllm_py.core.executor import Capacity, Executor
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams

VERSION = 1
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (512, 2048, 8192)
_CHUNK = 256  # tokens that are computed behind a context
_SHORT = 128  # tokens of context of each decode
_ROUNDS = 3

_log = log.get(__name__)


def write_profile(executor: Executor, config: EngineConfig, clock: Clock) -> None:
    """Measure and write `config.profile_to`. Raises UsageError when the file cannot be written."""
    path, capacity = Path(config.profile_to), executor.capacity()
    layout = executor.kv_memory().layout
    found = {
        "version": VERSION,
        "model": Path(config.model_path).name,
        "device": capacity.device,
        "dtype": capacity.dtype,
        "quantization": config.quantization,
        "threads": config.cpu_threads,
        "block_size": capacity.block_size,
        "num_blocks": capacity.num_blocks,
        "num_layers": layout.num_layers,
        "kv_bytes_per_token": 2 * layout.num_layers * layout.block_bytes // capacity.block_size,
        **_Timing(executor, capacity, clock).measure(),
    }
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--profile_steps={path} cannot be written ({error.strerror})") from error
    _log.info("steps profiled", file=str(path))


class _Timing:
    """Steps of one executor."""

    def __init__(self, executor: Executor, capacity: Capacity, clock: Clock) -> None:
        self._executor, self._capacity, self._clock = executor, capacity, clock
        self._longest = min(
            capacity.facts.max_model_len - 1, (capacity.num_blocks - 1) * capacity.block_size
        )

    def measure(self) -> dict[str, Any]:
        """[tokens, context, seconds] of prompts, [sequences, context, seconds] of decodes."""
        prompts = [(tokens, 0) for tokens in _TOKENS]
        prompts += [(_CHUNK, context) for context in _CONTEXTS]
        decodes = [(batch, _SHORT) for batch in _BATCHES if batch <= self._capacity.max_seqs]
        decodes += [(1, context) for context in _CONTEXTS]
        return {
            "prefill": [
                [tokens, context, self._seconds(1, tokens, context)]
                for tokens, context in prompts
                if tokens + context <= self._longest
            ],
            "decode": [
                [batch, context, self._seconds(batch, 1, context)]
                for batch, context in decodes
                if context < self._longest and self._fits(batch, context)
            ],
        }

    def _fits(self, batch: int, context: int) -> bool:
        return context // self._capacity.block_size + batch <= self._capacity.num_blocks

    def _seconds(self, batch: int, tokens: int, context: int) -> float:
        """Median of a step that computes so many tokens of each sequence behind its context."""
        plan = self._plan(batch, tokens, context)
        times = []
        for _ in range(1 + _ROUNDS):
            began = self._clock.now()
            self._executor.execute(plan)
            times.append(self._clock.now() - began)
        return round(statistics.median(times[1:]), 7)

    def _plan(self, batch: int, tokens: int, context: int) -> StepPlan:
        """Sequences share the blocks of their context and have their own for what is written."""
        size, vocabulary = self._capacity.block_size, self._capacity.facts.vocab_size
        shared = context // size
        own = -(-(context + tokens) // size) - shared
        starts = [
            RowStart(
                row=row,
                request_id=f"profile-{row}",
                block_ids=(*range(shared), *range(shared + row * own, shared + (row + 1) * own)),
                sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
            )
            for row in range(batch)
        ]
        return StepPlan(
            step=0,
            started=tuple(starts),
            rows=list(range(batch)),
            num_tokens=[tokens] * batch,
            num_computed=[context] * batch,
            token_ids=[(7919 * i + 31) % vocabulary for i in range(batch * tokens)],
            sample=[1] * batch,
            positions=[0] * batch,
        )
