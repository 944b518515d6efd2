"""The start-up proof: equal bits give a fingerprint of the numbers, anything else says approximate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.checkpoints import make_checkpoint
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.engine.ranks import open_executor
from xllm_py.engine.self_test import APPROXIMATE, numerics_fingerprint
from xllm_py.engine.worker import Worker


class FakeWorker:
    """Logits are what `say` makes of the tokens so far and of the plan."""

    def __init__(self, say: Callable[[list[int], StepPlan], Tensor]) -> None:
        self._say = say
        self._known: list[int] = []
        self.plans: list[StepPlan] = []
        self.observer: Any = None

    def execute(self, plan: StepPlan, layer_done: object) -> StepResult:
        self.plans.append(plan)
        self._known = [*self._known[: plan.num_computed[0]], *plan.token_ids]
        if plan.sample[0]:
            self.observer(["self-test"], plan.positions, self._say(self._known, plan))
        return StepResult(token_ids=[0] * sum(plan.sample))


def fingerprint(
    worker: FakeWorker, max_len: int = 100, num_blocks: int = 50, vocab_size: int = 300
) -> str:
    return numerics_fingerprint(cast("Worker", worker), vocab_size, max_len, num_blocks, 4)


def by_tokens(known: list[int], plan: StepPlan) -> Tensor:
    return torch.tensor([[float(sum(known)), float(len(known))]])


def test_numbers_that_depend_on_the_tokens_alone_are_named_by_their_bits() -> None:
    name = fingerprint(FakeWorker(by_tokens))
    assert name == fingerprint(FakeWorker(by_tokens)) != APPROXIMATE
    nudged = FakeWorker(lambda known, plan: by_tokens(known, plan) * (1 + 2**-23))
    assert fingerprint(nudged) not in (name, APPROXIMATE)


@pytest.mark.parametrize("place", ["size", "start"])
def test_one_bit_that_depends_on_chunks_is_approximate(place: str) -> None:
    def say(known: list[int], plan: StepPlan) -> Tensor:
        chunked = plan.num_tokens[0] != len(known) if place == "size" else plan.num_computed[0] > 0
        return by_tokens(known, plan) * (1 + 2**-23 if chunked and len(known) == 34 else 1)

    assert fingerprint(FakeWorker(say)) == APPROXIMATE


def test_prompts_stay_inside_vocabulary_length_and_blocks() -> None:
    for max_len, num_blocks in ((100, 50), (10, 50), (100, 3), (2, 2)):
        worker = FakeWorker(by_tokens)
        fingerprint(worker, max_len, num_blocks, vocab_size=7)
        for plan in worker.plans:
            assert plan.num_computed[0] + plan.num_tokens[0] < max_len
            assert all(block < num_blocks for start in plan.started for block in start.block_ids)
            assert all(0 <= token < 7 for token in plan.token_ids)


def test_the_observer_is_given_back() -> None:
    worker = FakeWorker(by_tokens)
    fingerprint(worker)
    assert worker.observer is None


def name_of(folder: Path, dtype: str, threads: int = 1, block_size: int = 16) -> str:
    config = EngineConfig(
        model_path=str(folder),
        dtype=dtype,
        cpu_threads=threads,
        cache=CacheConfig(block_size=block_size, max_cache_bytes=1 << 20),
    )
    executor = open_executor(config)
    try:
        return executor.capacity().numerics_fingerprint
    finally:
        executor.close()


@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (9, 3)], ids=str)
def test_a_real_model_keeps_the_promise_whatever_its_heads_threads_and_blocks(
    tmp_path: Path, heads: tuple[int, int]
) -> None:
    folder = make_checkpoint(
        tmp_path, heads=heads[0], kv_heads=heads[1], hidden_size=heads[0] * 16, intermediate=100
    )
    before = torch.get_num_threads()
    try:
        names = {
            dtype: [name_of(folder, dtype, *how) for how in ((1, 16), (1, 4), (2, 16))]
            for dtype in ("float32", "bfloat16")
        }
    finally:
        torch.set_num_threads(before)
    for found in names.values():
        assert APPROXIMATE not in found
        assert found[0] == found[1]
    assert names["float32"][0] != names["bfloat16"][0]


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", seed=1)
    two = make_checkpoint(tmp_path / "two", seed=2)
    assert name_of(one, "auto") != name_of(two, "auto")


def test_tokens_behind_a_long_context_are_compared_too() -> None:
    ends: list[int] = []

    def say(known: list[int], plan: StepPlan) -> Tensor:
        ends.append(plan.num_computed[0] + plan.num_tokens[0])
        return torch.ones(1, 2)

    worker = FakeWorker(say)
    assert fingerprint(worker, max_len=1000, num_blocks=5) != APPROXIMATE
    assert ends[-1] > 512
    first = next(plan for plan in reversed(worker.plans) if plan.started)
    written = first.started[0].block_ids[first.num_computed[0] // 4 :]
    assert 0 not in written, "the block that stands for the context stays as it is"

    def windowed(known: list[int], plan: StepPlan) -> Tensor:
        return torch.full((1, 2), 1.0 + (plan.num_computed[0] > 512))

    assert fingerprint(FakeWorker(windowed), max_len=1000) == APPROXIMATE


@pytest.mark.parametrize(("compiler", "matters"), [("", False), ("no-such-compiler", True)])
def test_threads_are_part_of_the_name_where_they_may_be_part_of_the_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, matters: bool
) -> None:
    monkeypatch.setenv("CXX", compiler)  # without one torch computes
    folder = make_checkpoint(tmp_path, layers=1)
    before = torch.get_num_threads()
    try:
        assert (name_of(folder, "auto", 1) != name_of(folder, "auto", 2)) is matters
    finally:
        torch.set_num_threads(before)
