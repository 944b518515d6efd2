"""One engine, or P and D, in this thread under the real HTTP door: what the grid asks its questions of.

Schedulers, handoff agents, the in-memory KV transport and the door with its LocalBackend are the real ones; the executor is
the toy or a model. What two API processes carry between engines is carried by hand. Every request leaves traces (`Traces`),
so that a case can show that it went the way its column of the grid is named after.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.openai.support import Answer, Call
from xllm_py.base.clock import HandClock, RealClock
from xllm_py.base.errors import RequestError
from xllm_py.base.metrics import Metrics
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.executor import Executor
from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.request import Receiver, Submission
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.instance.local_backend import LocalBackend
from xllm_py.instance.outlets import Outlets, copy_entry
from xllm_py.openai.app import App
from xllm_py.openai.backend import Readiness, ServedModel
from xllm_py.openai.chat_template import ChatTemplate
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import load_tokenizer
from xllm_py.transport.memory import MemoryKvTransport, MemoryNetwork
from xllm_py.wire import messages as m

TURN_S = 0.005
MOST_TURNS = 2000
ANSWER_TIMEOUT_S = 60.0
RECEIVER = Receiver(name="d", address="d:1", incarnation="d-1")
MakeExecutor = Callable[[EngineConfig, int], Executor]  # with so many blocks of KV


@dataclasses.dataclass
class Traces:
    """What happened to requests, by their ids."""

    verdicts: dict[str, str] = dataclasses.field(default_factory=dict)
    held_blocks: dict[str, int] = dataclasses.field(default_factory=dict)  # that D had already
    restarts: Counter[str] = dataclasses.field(default_factory=Counter)  # rows begun again
    chunks: Counter[str] = dataclasses.field(default_factory=Counter)  # steps without a draw
    tokens: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=dict)


class Engine:
    """What engine/loop is, without pipe and process."""

    def __init__(
        self,
        name: str,
        executor: Executor,
        config: EngineConfig,
        *,
        traces: Traces,
        prefix_root: bytes,
        network: MemoryNetwork | None,
    ) -> None:
        capacity, layout = executor.capacity(), executor.kv_memory().layout
        self.executor = executor
        self.events: list[m.Event] = []
        self.scheduler = Scheduler(
            config.scheduler,
            capacity.facts,
            capacity.num_blocks,
            capacity.block_size,
            prefix_root,
            executor.kv_memory().poison,
        )
        self.transport = None
        if network is not None:
            self.transport = MemoryKvTransport(
                network=network,
                memory=executor.kv_memory(),
                incarnation=f"{name}-1",
                cluster_key=b"key",
            )
        self.agent = HandoffAgent(
            scheduler=self.scheduler,
            transport=self.transport,
            config=config.scheduler,
            model_fingerprint=capacity.model_fingerprint,
            layout=layout,
            send=self.events.append,
        )
        self._traces = traces
        self._owners: dict[int, str] = {}

    def turn(self, now: float) -> Outputs:
        """One round of the loop."""
        self.agent.on_news(now)
        plan = self.scheduler.schedule(now)
        self.agent.before_step(plan, now)
        if not plan.empty:
            self._note(plan)
            self.scheduler.apply(plan, self.executor.execute(plan, self.agent.layer_done), now)
        self.agent.after_step(now)
        return self.scheduler.take_outputs()

    def _note(self, plan: StepPlan) -> None:
        started = {start.row for start in plan.started}
        self._owners |= {start.row: start.request_id for start in plan.started}
        columns = zip(plan.rows, plan.positions, plan.num_computed, plan.sample, strict=True)
        for row, position, computed, draws in columns:
            name = self._owners[row]
            self._traces.restarts[name] += row in started and position > 0 and computed == 0
            self._traces.chunks[name] += not draws

    @property
    def busy(self) -> bool:
        return self.scheduler.has_work() or bool(self.scheduler.ledger()["requests_open"])

    def assert_empty(self) -> None:
        """Nothing is left of anybody."""
        self.scheduler.assert_empty()
        assert (self.agent.giving.num_open, self.agent.taking.num_open) == (0, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A column of the grid."""

    name: str
    is_pd: bool = False
    p_cache: bool = False
    d_cache: bool = False
    pull: bool = False  # D fetches, else P pushes
    chunk: int = 10240
    num_blocks: int = 1200
    block_size: int = 4
    max_seqs: int = 160


class Cluster:
    """`ask` it as a client does. It is the engine link of its own LocalBackend."""

    def __init__(
        self,
        setup: Setup,
        make: MakeExecutor,
        folder: Path,
        template: ChatTemplate | None,
    ) -> None:
        self.traces = Traces()
        self.clock = HandClock()
        self.company: Submission | None = None  # goes in just before the next request of the door
        self._wake = asyncio.Event()
        self._ended: set[tuple[str, int]] = set()
        self._outlets = Outlets(send=lambda *_: None)
        network = MemoryNetwork(self.clock) if setup.is_pd else None
        config = EngineConfig(
            toy_num_blocks=setup.num_blocks,
            cpu_threads=1,
            model_path=str(folder),
            cache=CacheConfig(block_size=setup.block_size),
            scheduler=SchedulerConfig(
                prefill_usage_threshold=1.0,
                max_seqs_per_batch=setup.max_seqs,
                max_tokens_per_chunk=setup.chunk,
                kv_pull=setup.pull,
            ),
        )
        roles = (("p", setup.p_cache), ("d", setup.d_cache)) if setup.is_pd else (("p", False),)
        self.engines = [
            Engine(
                name,
                make(config, setup.num_blocks),
                config,
                traces=self.traces,
                prefix_root=b"root" if cached else b"",
                network=network,
            )
            for name, cached in roles
        ]
        self.p, self.d = self.engines[0], self.engines[-1]
        facts = self.p.executor.capacity().facts
        model = ServedModel(
            name="grid", max_model_len=facts.max_model_len, vocab_size=facts.vocab_size
        )
        backend = LocalBackend(
            engine=self,  # type: ignore[arg-type]  # the two verbs it uses
            outlets=self._outlets,
            models=lambda: (model,),
            ready=lambda: Readiness(ready=True),
            clock=RealClock(),
            on_journey=lambda *_: None,
        )
        self._app = App(
            backend,
            load_tokenizer(folder),
            template,
            settings=HttpSettings(max_concurrent_requests=0),
            metrics=Metrics(),
            clock=RealClock(),
        )

    # ---- the engine link ----

    def submit(self, submission: Submission) -> None:
        """To P, for D when there is one."""
        if self.d is not self.p:
            submission = dataclasses.replace(submission, receiver=RECEIVER)
        company, self.company = self.company, None
        try:
            if company is not None:
                self.p.scheduler.add(company, self.clock.now())
            self.p.scheduler.add(submission, self.clock.now())
        except RequestError as error:
            self.p.scheduler.refuse(submission, error)
        self._wake.set()

    def abort(self, request_ids: Sequence[str], attempts: Sequence[int]) -> None:
        """The client has what it wants: a stop string was found, or an error ended it."""
        for request_id, attempt in zip(request_ids, attempts, strict=True):
            for engine in self.engines:
                engine.scheduler.abort(request_id, attempt, self.clock.now())
        self._wake.set()

    # ---- engines ----

    async def run(self) -> None:
        """Turn the engines for ever; the door gets its turn between two rounds."""
        while True:
            self.turn()
            await asyncio.sleep(0)
            if not any(engine.busy for engine in self.engines):
                self._wake.clear()
                await self._wake.wait()

    def turn(self) -> None:
        """One round of each engine, and the post between them."""
        now = self.clock.turn(TURN_S)
        for engine in self.engines:
            self._tell(engine.turn(now))
            events, engine.events[:] = list(engine.events), []
            for event in events:
                self._carry(event, now)

    def _carry(self, event: m.Event, now: float) -> None:
        match event:
            case m.OffersOut(offers=offers):
                endpoint = self.p.transport.endpoint if self.p.transport is not None else ""
                named = [
                    dataclasses.replace(offer, giver_incarnation="p-1", endpoints=(endpoint,))
                    for offer in offers
                ]
                self.d.agent.on_offers(m.Offers(offers=named), now)
            case m.Answers(answers=answers):
                for answer in answers:
                    self.traces.held_blocks[answer.request_id] = answer.num_held_blocks
                self.p.agent.giving.on_answers(event, now)
            case m.FirstTokensOut(firsts=firsts):
                self.d.agent.taking.on_first_tokens(m.FirstTokens(firsts=firsts), now)
            case m.FirstTaken():
                self.p.agent.giving.on_first_taken(event, now)
            case m.CancelsOut(request_ids=request_ids, attempts=attempts):
                for request_id, attempt in zip(request_ids, attempts, strict=True):
                    self.d.scheduler.abort(request_id, attempt, now)
            case m.Verdicts(request_ids=request_ids, kinds=kinds):
                self.traces.verdicts |= dict(zip(request_ids, kinds, strict=True))

    def _tell(self, outputs: Outputs) -> None:
        """To the door. D also says of a choice that ended by its first token, which P told, that it ended."""
        fresh = Outputs(step=outputs.step)
        for index, request_id in enumerate(outputs.request_ids):
            key = (request_id, outputs.choices[index])
            if key in self._ended:
                assert outputs.token_ids[index] == -1, "a token behind the last one"
                continue
            copy_entry(outputs, index, fresh)
            if outputs.token_ids[index] >= 0:
                self.traces.tokens.setdefault(key, []).append(outputs.token_ids[index])
            if outputs.finish_reasons[index]:
                self._ended.add(key)
        self._outlets.on_outputs(fresh)

    # ---- clients ----

    async def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """One HTTP request through the ASGI application."""
        call = Call(self._app, "POST", path, {"model": "grid", **body})
        await asyncio.wait_for(call.task, ANSWER_TIMEOUT_S)
        return call.answer

    def rest(self) -> None:
        """Turn until no engine has anything to do."""
        for _ in range(MOST_TURNS):
            if not any(engine.busy for engine in self.engines):
                return
            self.turn()
        raise AssertionError([engine.scheduler.ledger() for engine in self.engines])

    async def close(self) -> None:
        """Everybody has his answer: the engines must come to rest with nothing left."""
        self.rest()
        for _ in range(20):
            self.turn()
        for engine in self.engines:
            engine.assert_empty()
            if engine.transport is not None:
                engine.transport.close()
            engine.executor.close()
        await self._app.close()
