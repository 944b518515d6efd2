"""The protocol the engine loop asks: plan in, result out.

Real: engine/ranks.py over torch. Fake, and keystone of testing: engine/toy.py, whose next token is a hash of what the
blocks hold. An executor knows rows, blocks and tokens; it knows nothing of requests, peers or time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xllm_py.core.config import ModelFacts
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.core.plan import StepPlan, StepResult

LayerDone = Callable[[int], None]
Finish = Callable[[], StepResult]  # waits for the result of a step that was begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What an executor offers; fixed for its life."""

    num_blocks: int
    block_size: int
    max_seqs: int
    facts: ModelFacts
    dtype: str
    device: str
    model_fingerprint: str
    numerics_fingerprint: str
    summary: tuple[str, ...] = ()  # how the memory was sized, in plain words, for the log


class Executor(Protocol):
    """One model on one or more ranks, with its KV cache."""

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        """Compute one step.

        `layer_done(layer)` is called, in ascending order, as soon as the KV of that layer is complete for every token of
        the plan, so that it can be sent while later layers compute. A failure that concerns one row is reported in
        `failed_rows`; anything raised means that the executor is broken.
        """
        ...

    def begin(self, plan: StepPlan, layer_done: LayerDone | None = None) -> Finish:
        """As `execute`, without waiting where the device computes apart from the host.

        Steps are finished in the order they were begun. A carried plan may be begun before the one before it is finished; no other may.
        """
        ...

    def capacity(self) -> Capacity:
        """Sizes and facts, known once the model is loaded."""
        ...

    def kv_memory(self) -> KvMemory:
        """The cache as bytes, for the KV link; of the rank that plans."""
        ...

    def kv_share(self) -> Share:
        """Which heads these are of the model's."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...
