"""The loop goes on when a request breaks the model, says so to its client, and ends when the executor is broken."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from xllm_py.base.clock import RealClock
from xllm_py.base.errors import StartError
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.executor import LayerDone
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.engine.loop import EngineLoop
from xllm_py.engine.toy import ToyExecutor
from xllm_py.transport.pipe import EnginePipe

POISON = 300


class Crashing(ToyExecutor):
    """Raises on one token, or always."""

    broken = False

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        if self.broken or POISON in plan.token_ids:
            raise MemoryError("a secret path")
        return super().execute(plan, layer_done)


class Engine:
    def __init__(self) -> None:
        self.config = EngineConfig(toy_num_blocks=16, cache=CacheConfig(block_size=4))
        self.executor = Crashing(self.config)
        capacity = self.executor.capacity()
        self.scheduler = Scheduler(self.config.scheduler, capacity.facts, 16, 4)
        ours, self.theirs = socket.socketpair()
        self.pipe = EnginePipe(ours)
        agent = HandoffAgent(
            scheduler=self.scheduler,
            transport=None,
            config=self.config.scheduler,
            model_fingerprint="",
            layout=self.executor.kv_memory().layout,
            send=self.pipe.send,
        )
        self.loop = EngineLoop(
            scheduler=self.scheduler,
            executor=self.executor,
            agent=agent,
            pipe=self.pipe,
            clock=RealClock(),
        )

    def add(self, name: str, *prompt: int) -> None:
        sampling = SamplingParams(max_tokens=3, temperature=0.0, seed=0, ignore_eos=True)
        given = Submission(request_id=name, prompt_ids=prompt, sampling=sampling)
        self.scheduler.add(given, RealClock().now())

    def run(self) -> bytes:
        """What it said to the API process."""
        while self.scheduler.has_work():
            self.loop.turn(0.0)
        return self.theirs.recv(1 << 20)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.pipe.close()
    made.theirs.close()


def test_the_client_is_told_an_id_that_the_log_knows_and_nothing_of_the_exception(
    engine: Engine,
) -> None:
    engine.add("good", 1, 2, 3)
    engine.add("bad", 1, POISON, 3)
    said = engine.run()
    assert b"internal_error" in said and b"MemoryError" in said and b"err-" in said
    assert b"secret" not in said
    assert said.count(b"length") == 1
    engine.scheduler.assert_empty()


def test_a_broken_executor_ends_the_engine(engine: Engine) -> None:
    engine.add("a", 1, 2, 3)
    engine.add("b", 1, 2, 4)
    engine.executor.broken = True
    with pytest.raises(StartError, match="the executor failed in step"):
        engine.run()
