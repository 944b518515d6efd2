"""An engine process of a simulation: the real loop, scheduler, handoff agent and pipe over a toy executor and the memory transport.

What is simulated is time (a step takes some) and the socketpair (bytes travel a little). While a step is computed, commands that
arrive in that time can be read between two layers, as in the real engine.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, cast

from tests.sim.metrics import Tally
from tests.sim.virtual import VirtualLoop
from xllm_py.base.hashing import chain_root
from xllm_py.core.config import EngineConfig
from xllm_py.core.executor import Capacity, Finish, LayerDone
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.__main__ import _ready
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.engine.loop import EngineLoop
from xllm_py.engine.toy import ToyExecutor
from xllm_py.transport.kv_events import Wake
from xllm_py.transport.memory import MemoryKvTransport, MemoryNetwork
from xllm_py.transport.pipe import ApiPipe, EnginePipe

HOLDINGS = ("free", "active", "cached", "staged", "quarantined")
_PIPE_S = (0.00005, 0.002)
_SHORTEST_S = 0.0001


class Wire:
    """The engine's end of the socketpair; the API process's end is a StreamReader and `write`."""

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self.reader = asyncio.StreamReader(loop=loop)
        self.on_arrival: Callable[[], None] = lambda: None
        self.later_s = 0.0  # what the engine says now leaves so much later: after its step
        self._loop = loop
        self._random = random
        self._down: deque[tuple[float, bytes]] = deque()
        self._read: deque[bytes] = deque()
        self._up: deque[bytearray] = deque()
        self._said_at = -1.0
        self._due_down = self._due_up = 0.0
        self._wake = Wake()
        self._closed = False

    # ---- the API process: a StreamWriter ----

    def write(self, data: bytes) -> None:
        self._due_down = max(self._due_down, self._loop.time() + self._random.uniform(*_PIPE_S))
        self._down.append((self._due_down, data))
        self._loop.call_at(self._due_down, self._arrived)

    def _arrived(self) -> None:
        if not self._closed:
            self.on_arrival()

    def is_closing(self) -> bool:
        return self._closed

    # ---- the engine: a socket ----

    def settimeout(self, _timeout_s: float) -> None:
        """It never blocks."""

    def fileno(self) -> int:
        return self._wake.fd

    def release(self, until: float) -> None:
        """Let the engine read what has arrived by then."""
        while self._down and self._down[0][0] <= until + 1e-9:
            self._read.append(self._down.popleft()[1])
            self._wake.ring()

    def sendall(self, data: bytes) -> None:
        """What is said at one moment arrives together."""
        now = self._loop.time() + self.later_s
        if self._up and self._said_at == now:
            self._up[-1] += data
            return
        self._said_at = now
        self._up.append(bytearray(data))
        self._due_up = max(self._due_up, now + self._random.uniform(*_PIPE_S))
        self._loop.call_at(self._due_up, self._feed)

    def _feed(self) -> None:
        if not self._closed:
            self.reader.feed_data(self._up.popleft())

    def recv(self, _most: int) -> bytes:
        self._wake.hush()
        data = b"".join(self._read)
        self._read.clear()
        return data

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._wake.close()


class Stepping:
    """Implements Executor over another one: says when a step begins and when a layer is done."""

    def __init__(self, inner: ToyExecutor, engine: Engine) -> None:
        self._inner = inner
        self._engine = engine

    def capacity(self) -> Capacity:
        return self._inner.capacity()

    def kv_memory(self) -> KvMemory:
        return self._inner.kv_memory()

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        step_s = self._engine.begin_step(plan)
        layers = self.kv_memory().layout.num_layers
        poisonous = self._engine.is_poisonous(plan)

        def done(layer: int) -> None:
            if poisonous:
                raise RuntimeError("a poisonous request")
            self._engine.wire.release(self._engine.now + step_s * (layer + 1) / layers)
            if layer_done is not None:
                layer_done(layer)

        return self._inner.execute(plan, done)

    def begin(self, plan: StepPlan, layer_done: LayerDone | None = None) -> Finish:
        """As late as can be: all that happens meanwhile happens before it is computed."""
        return lambda: self.execute(plan, layer_done)

    def close(self) -> None:
        self._inner.close()


class Engine:
    """One life of an engine."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        kv: Kv,
        loop: VirtualLoop,
        random: Random,
        name: str,
        trace: Callable[..., None],
        tally: Tally,
        poison: Mapping[str, int],
    ) -> None:
        """poison: request -> the token of it that cannot be computed."""
        self.name = name
        self.alive = True
        self.wire = Wire(loop, random)
        self.wire.on_arrival = self.poke
        self.step_s = lambda: random.uniform(0.0005, 0.006)
        self._kv, self._loop, self._random, self._trace = kv, loop, random, trace
        self._tally = tally
        self._poison = poison
        self._poisonous: dict[int, int] = {}  # row -> token
        self._rows_given: set[tuple[str, int]] = set()  # request and choice
        self._stepped_s = 0.0
        self._busy_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        executor = ToyExecutor(config)
        memory = executor.kv_memory()
        capacity = executor.capacity()
        self.num_blocks = capacity.num_blocks
        self.transport = MemoryKvTransport(
            network=kv.network,
            memory=memory,
            incarnation=config.incarnation,
            cluster_key=config.cluster_key,
        )
        root = b""
        if config.cache.enable_prefix_cache:
            root = chain_root(key=config.cluster_key, model_fingerprint=capacity.model_fingerprint)
        self.scheduler = Scheduler(
            config.scheduler,
            capacity.facts,
            capacity.num_blocks,
            capacity.block_size,
            root,
            memory.poison,
        )
        pipe = EnginePipe(cast("Any", self.wire))
        self.agent = HandoffAgent(
            scheduler=self.scheduler,
            transport=self.transport,
            config=config.scheduler,
            model_fingerprint=capacity.model_fingerprint,
            layout=memory.layout,
            send=pipe.send,
        )
        self.agent.giving._jitter.seed(random.random())  # the one draw that is not the seed's
        self._engine_loop = EngineLoop(
            scheduler=self.scheduler,
            executor=Stepping(executor, self),
            agent=self.agent,
            pipe=pipe,
            clock=loop.clock,
            overlaps=config.scheduler.overlap,
        )
        pipe.send(_ready(executor, (self.transport.endpoint,)))
        kv.engines.append(self)
        self._at(loop.time())

    def api_pipe(self) -> ApiPipe:
        """For the API process."""
        return ApiPipe(self.wire.reader, cast("Any", self.wire))

    @property
    def now(self) -> float:
        return self._loop.time()

    # ---- time ----

    def poke(self) -> None:
        """There is news; a step that runs is finished first."""
        if self.alive:
            self._at(max(self.now, self._busy_until))

    def _at(self, when: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._turn)

    def begin_step(self, plan: StepPlan) -> float:
        """The executor was called; returns how long it takes."""
        step_s = self._stepped_s = self.step_s()
        self.wire.later_s = step_s
        self._trace("step", self.name, *plan.rows, *plan.token_ids)
        for start in plan.started:
            key = (start.request_id, start.choice)
            self._tally.counts["rows given again"] += key in self._rows_given
            self._rows_given.add(key)
        return step_s

    def is_poisonous(self, plan: StepPlan) -> bool:
        """Whether this step raises."""
        for start in plan.started:
            self._poisonous.pop(start.row, None)
            if start.request_id in self._poison:
                self._poisonous[start.row] = self._poison[start.request_id]
        ends = zip(plan.rows, plan.num_computed, plan.num_tokens, strict=True)
        return any(
            row in self._poisonous and start + count > self._poisonous[row]
            for row, start, count in ends
        )

    def _turn(self) -> None:
        self._timer = None
        if not self.alive:
            return
        self.wire.release(self.now)
        self._stepped_s = self.wire.later_s = 0.0
        self._engine_loop.turn(0.0)
        self._busy_until = self.now + self._stepped_s
        sleep_s = self._engine_loop._sleep_s()
        self._at(self._busy_until + max(sleep_s, _SHORTEST_S))
        self._kv.after_turn()

    # ---- what must be true ----

    def open_things(self) -> dict[str, int]:
        """What must be nothing when all is quiet."""
        counts = self.scheduler.ledger()
        assert counts["total"] == sum(counts[name] for name in HOLDINGS), (self.name, counts)
        return {
            "blocks": counts["total"] - counts["free"] - counts["cached"],
            "requests": counts["requests_open"],
            "rows": counts["rows"],
            "giving": self.agent.giving.num_open,
            "taking": self.agent.taking.num_open,
            "grants open": self.transport.ledger()["grants_open"],
        }

    @property
    def num_given(self) -> int:
        """Grants that its transport works on as the giver, less the probes that it asked for; a probe by fetching is counted at one side and asked for at the other."""
        return self.transport.ledger()["grants_given"] - self.agent.probing.num_open

    def die(self) -> None:
        """The process is killed: its links break, its pipe ends."""
        if not self.alive:
            return
        counts = self.scheduler.ledger()
        for name in (
            "prefix_hit_tokens",
            "forked_choices",
            "copied_blocks",
            "prefix_evicted_blocks",
        ):
            self._tally.counts[f"{name} {self.name[0]}"] += counts[name]
        self.alive = False
        if self._timer is not None:
            self._timer.cancel()
        self._kv.engines.remove(self)
        self.transport.close()
        self.wire.close()


class Kv:
    """The KV network: moves bytes a little after they were pushed, and wakes who has news."""

    def __init__(self, loop: VirtualLoop, random: Random, network: MemoryNetwork) -> None:
        self.network = network
        self.engines: list[Engine] = []
        self._loop, self._random = loop, random
        self._pumping: asyncio.TimerHandle | None = None

    def after_turn(self) -> None:
        """An engine had its turn: it may have pushed something, and has moved what was due."""
        if not self.network.links:
            return
        self.wake()
        if self._pumping is None and any(
            link.sending.due is not None for link in self.network.links
        ):
            delay_s = self._random.uniform(0.0, 0.002)
            self._pumping = self._loop.call_later(delay_s, self._pump)

    def _pump(self) -> None:
        self._pumping = None
        self.network.pump()
        self.wake()
        found = (link.sending.due for link in self.network.links)
        dues = [due for due in found if due is not None]
        if dues:
            self._pumping = self._loop.call_at(max(min(dues), self._loop.time()), self._pump)

    def wake(self) -> None:
        """Whoever has events is given a turn."""
        by_fd = {engine.transport.wake_fd: engine for engine in self.engines}
        for fd in select.select(list(by_fd), [], [], 0.0)[0] if by_fd else ():
            by_fd[fd].poke()

    def cut(self, one: str, other: str) -> None:
        """Break the links of two engines, by name."""
        names = {one, other}
        for link in list(self.network.links):
            if {
                link.giver.incarnation.partition(".")[0],
                link.taker.incarnation.partition(".")[0],
            } == names:
                link.end("the link was cut")
        self.wake()
