"""A scheduler and a real executor in one process: run submissions to their end, see tokens and logits."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.devices import BLOCK_SIZE, DEVICE
from xllm_py.base.clock import HandClock
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.executor import Finish
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.ranks import OneRank, open_executor


class Rig:
    """One engine without processes. Logits are kept by (request, position)."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str = "auto",
        block_size: int = BLOCK_SIZE,
        cache_bytes: int = 32 << 20,
        chunk: int = 10240,
        max_seqs: int = 64,
        threads: int = 1,
        prefix_root: bytes = b"",
        mix_batch: bool = True,
        ahead: bool = False,
    ) -> None:
        """ahead: steps are begun before the one before them is taken in, where they may."""
        config = EngineConfig(
            model_path=str(model),
            dtype=dtype,
            cpu_threads=threads,
            devices=(DEVICE,),
            cache=CacheConfig(block_size=block_size, max_cache_bytes=cache_bytes),
            scheduler=SchedulerConfig(
                max_seqs_per_batch=max_seqs,
                max_tokens_per_chunk=chunk,
                prefill_usage_threshold=1.0,
                mix_batch=mix_batch,
            ),
        )
        executor = open_executor(config)
        assert isinstance(executor, OneRank)
        self.executor = executor
        capacity = executor.capacity()
        self.config = config
        self.scheduler = Scheduler(
            config.scheduler,
            capacity.facts,
            capacity.num_blocks,
            capacity.block_size,
            prefix_root,
            executor.kv_memory().poison,
        )
        self.clock = HandClock()
        self.tokens: dict[str, list[int]] = {}
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.ahead = ahead
        self.num_ahead = 0  # steps begun so
        self.under_way: list[tuple[StepPlan, Finish]] = []
        self.num_starts = 0  # rows assigned; more than requests when some were preempted
        executor.worker.observer = self._observe

    def _observe(self, ids: list[str], positions: list[int], logits: torch.Tensor) -> None:
        for row, key in enumerate(zip(ids, positions, strict=True)):
            self.logits[key] = logits[row].clone()

    def add(self, name: str, prompt: list[int], count: int, **sampling: float) -> None:
        """Queue a request that ends by length only."""
        fields = {"temperature": 0.0, "seed": 1, **sampling}
        params = SamplingParams(max_tokens=count, ignore_eos=True, **fields)  # type: ignore[arg-type]  # floats and ints by name
        submission = Submission(request_id=name, prompt_ids=tuple(prompt), sampling=params)
        self.scheduler.add(submission, self.clock.now())

    def step(self) -> bool:
        """One step; False when there is nothing left."""
        now = self.clock.turn(0.001)
        if not self.under_way:
            plan = self.scheduler.schedule(now)
            if plan.empty:
                return self.scheduler.has_work()
            self.num_starts += len(plan.started)
            self.under_way.append((plan, self.executor.begin(plan)))
        ahead = self.scheduler.schedule_ahead(now) if self.ahead else None
        if ahead is not None:
            self.num_ahead += 1
            self.under_way.append((ahead, self.executor.begin(ahead)))
        plan, finish = self.under_way.pop(0)
        result = finish()
        assert not result.failed_rows
        self.scheduler.apply(plan, result, now)
        outputs = self.scheduler.take_outputs()
        for name, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
            self.tokens.setdefault(name, []).append(token)
        return True

    def run(self) -> dict[str, list[int]]:
        """To the end of everything queued; the scheduler must be empty then."""
        while self.scheduler.has_work() or self.under_way:
            self.step()
        self.scheduler.assert_empty()
        return self.tokens
