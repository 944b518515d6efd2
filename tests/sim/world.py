"""A whole cluster in one thread: registry, one or two masters, two prefill and two decode instances, and the clients of one script.

Everything of the product between the HTTP door and the KV sockets is the real thing; in memory are the registry, gRPC's channels
(grpc_memory), the KV transport, and the socketpair to each engine (engine).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from tests.sim.engine import Engine, Kv
from tests.sim.grpc_memory import Network, Weather
from tests.sim.metrics import Tally
from tests.sim.oracle import sampling_of
from tests.sim.script import BLOCK_SIZE, EVERY_NAME, MASTERS, Ask, Event, Script
from tests.sim.virtual import PROCESS, Process, VirtualLoop
from xllm_py.base.errors import RequestError
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.service_info import ServiceRecord, service_to_json
from xllm_py.control.server import serve_master
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.request import Submission
from xllm_py.core.service_config import EtcdSlice, HttpSlice, LogSlice
from xllm_py.instance import parts as instance_parts
from xllm_py.instance.card import Identity
from xllm_py.instance.config import AddressSlice, ClusterSlice, InstanceConfig
from xllm_py.master import parts as master_parts
from xllm_py.master.config import MasterConfig
from xllm_py.openai.backend import Delta
from xllm_py.registry.base import Lease
from xllm_py.registry.memory import MemoryLease, MemoryRegistry, Store
from xllm_py.transport.memory import Faults, MemoryNetwork
from xllm_py.wire import messages as m

KEY = b"k" * 32


class Wrong(AssertionError):
    """A property does not hold."""


GRANT_TTL_S = 2.0
LEASE_S = 0.4
START_S = 5.0  # how long the cluster may take to find itself
_ROLES = {name: Role.PREFILL if name.startswith("p") else Role.DECODE for name in EVERY_NAME}


class InOrder(dict[Callable[[], None], None]):
    """A set whose order is that of coming, so that runs repeat."""

    def add(self, listener: Callable[[], None]) -> None:
        self[listener] = None

    def discard(self, listener: Callable[[], None]) -> None:
        self.pop(listener, None)


class ProcessRegistry(MemoryRegistry):
    """One process's view of the registry; its leases end some time after it died."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._leases: list[int] = []

    async def lease(self, ttl_s: int) -> Lease:
        lease = self._store.grant(float("inf"))
        self._leases.append(lease)
        return MemoryLease(self._store, lease)

    def lapse(self) -> None:
        """Nobody keeps its leases alive."""
        for lease in self._leases:
            self._store.revoke(lease)


class Instance:
    """One life of an instance: its API process and its engine."""

    def __init__(self, world: World, name: str, life: int) -> None:
        number = EVERY_NAME.index(name)
        script = world.script
        self.name = name
        self.process = Process(name, 7001 + number, world.network)
        self.incarnation = f"{name}.{life}"
        self.registry = ProcessRegistry(world.store)
        self.ready = False
        self.draining = False
        self._world = world
        self.config = InstanceConfig(
            model_path="",
            served_names=("toy",),
            engine=EngineConfig(
                executor="toy",
                toy_num_blocks=script.num_blocks[name],
                max_model_len=100,
                cache=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_cache=name in script.prefix),
                scheduler=SchedulerConfig(
                    max_tokens_per_batch=script.tokens_per_batch,
                    max_seqs_per_batch=script.max_seqs,
                    enable_chunked_prefill=script.chunked,
                    max_tokens_per_chunk=script.tokens_per_chunk,
                    prefill_usage_threshold=script.threshold,
                    grant_ttl_s=GRANT_TTL_S,
                    enable_local_decode=script.local_decode,
                    kv_pull=script.pull,
                    overlap=script.overlap,
                    priority_strategy=script.strategy,
                ),
                incarnation=self.incarnation,
                cluster_key=KEY,
            ),
            addresses=AddressSlice(port=8001 + number, disagg_pd_port=0),
            http=HttpSlice(max_concurrent_requests=100),
            cluster=ClusterSlice(
                role=_ROLES[name],
                enable_disagg_pd=True,
                routed=True,
                etcd=EtcdSlice(address=""),
                heart_beat_interval_s=0.4,
                rpc_timeout_s=1.0,
            ),
            log=LogSlice(),
        )
        self.engine = Engine(
            self.config.engine,
            kv=world.kv,
            loop=world.loop,
            random=world.random,
            name=name,
            trace=world.trace,
            tally=world.tally,
            poison={ask.name: ask.poison_at for ask in script.asks if ask.poison_at is not None},
        )
        self.tasks = TaskFamily(name)
        self.parts: instance_parts.Parts
        self.routed: instance_parts.Routed | None = None

    async def start(self) -> None:
        """As instance/daemon does it."""
        self.parts = parts = instance_parts.Parts(
            self.config,
            clock=self._world.loop.clock,
            tasks=self.tasks,
            metrics=self._world.tally.as_metrics(),
        )
        pipe = self.engine.api_pipe()
        ready = (await pipe.receive())[0]
        assert isinstance(ready, m.Ready)
        parts.engine._pipe = pipe  # what EngineLink.start does after its exec
        self.tasks.start(parts.engine._listen(pipe), name="engine-events", vital=True)
        parts.on_engine_ready(ready)
        identity = Identity(
            incarnation=self.incarnation, cluster_key=KEY, http_port=self.config.addresses.port
        )
        self.routed = routed = await instance_parts.routed_parts(
            parts, self.registry, identity, drain=self._drain_by_call
        )
        await routed.announcer.announce(routed.card("READY"))
        self.tasks.start(routed.masters.follow(self.registry), name="masters", vital=True)
        self.ready = True

    async def _drain_by_call(self, _timeout_s: float) -> None:
        """Nobody calls it here."""

    async def drain(self) -> None:
        """As instance/daemon does it on SIGTERM, without the end of the process."""
        if self.routed is None or not self.ready:
            return
        self.draining = True
        self.parts.engine.drain()
        self.routed.service.draining = True
        await self.routed.announcer.announce(self.routed.card("DRAINING"))

    async def flush(self) -> None:
        """As POST /admin/flush_cache asks for it."""
        if self.ready:
            with contextlib.suppress(RequestError):
                await self.parts.engine.flush_cache()

    def die(self) -> None:
        """kill -9 of both processes."""
        world = self._world
        if not self.process.alive:
            return
        world.network.bury(self.process)
        self.engine.die()
        world.kv.wake()
        world.ending += self.process.end_tasks()
        world.loop.call_later(LEASE_S, self.registry.lapse)

    def open_things(self) -> dict[str, int]:
        """What must be nothing when all is quiet."""
        things = self.engine.open_things()
        if self.routed is not None:
            link = self.parts.engine
            things |= {
                "outlets": self.parts.outlets.num_open,
                "unacknowledged": self.routed.generations.num_unacknowledged,
                "relayed": self.routed.relay.num_open,
                "questions": len(link._answers) + len(link._taken) + len(link._ledgers),
            }
        return {name: count for name, count in things.items() if count}


class Master:
    """One master: the process that clients ask."""

    def __init__(self, world: World, name: str, port: int) -> None:
        self.name = name
        self.process = Process(name, port, world.network)
        self.tasks = TaskFamily(name)
        self.registry = ProcessRegistry(world.store)
        self.parts: master_parts.Parts
        self._world = world

    async def start(self) -> None:
        """As master/daemon does it, without HTTP."""
        world, script = self._world, self._world.script
        config = MasterConfig(
            tokenizer_path="",
            etcd=EtcdSlice(address=""),
            http=HttpSlice(max_concurrent_requests=100),
            decode_response_to_service=not script.relay,
            load_balance_policy=script.policy,
            target_ttft_s=30.0,  # nobody is refused
            log=LogSlice(),
            rpc_timeout_s=1.0,
            suspect_after_s=0.9,
            gone_after_s=1.8,
        )
        identity = master_parts.Identity(
            incarnation=f"{self.name}.1", cluster_key=KEY, rpc_address=self.process.address
        )
        self.parts = parts = master_parts.assemble(
            config,
            identity,
            clock=world.loop.clock,
            metrics=world.tally.as_metrics(),
            tasks=self.tasks,
            num_streams=lambda: 0,
        )
        parts.links._jitter.seed(world.random.random())
        parts.router._random.seed(script.seed)
        await serve_master(
            parts.generations,
            host="127.0.0.1",
            port=0,
            may_move=False,
            cluster_key=KEY,
            incarnation=identity.incarnation,
        )
        registry = self.registry
        await parts.manager.begin(registry)
        self.tasks.start(parts.manager.follow(registry), name="registry", vital=True)
        self.tasks.start(parts.manager.keep_time(), name="clock", vital=True)
        record = ServiceRecord(
            name=self.name,
            rpc_address=identity.rpc_address,
            http_address="",
            incarnation_id=identity.incarnation,
        )
        lease = await registry.lease(3)
        await lease.put(keys.service(identity.rpc_address), service_to_json(record, KEY))

    def die(self) -> None:
        """kill -9: its clients lose their connections."""
        world = self._world
        if self.process.alive:
            world.network.bury(self.process)
            world.ending += self.process.end_tasks()
            world.loop.call_later(LEASE_S, self.registry.lapse)

    def open_things(self) -> dict[str, int]:
        """What must be nothing when all is quiet."""
        if not self.process.alive:
            return {}
        return {name: count for name, count in self.parts.generations.ledger().items() if count}


@dataclasses.dataclass(kw_only=True)
class Told:
    """What one client has seen."""

    ask: Ask
    choices: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    finishes: dict[int, str] = dataclasses.field(default_factory=dict)
    error: str = ""
    left: bool = False
    ends: int = 0
    wrong: str = ""


class World:
    """The cluster of one script."""

    def __init__(self, script: Script, loop: VirtualLoop) -> None:
        self.script = script
        self.loop = loop
        self.random = Random(f"{script.seed} on the way")
        self.words: list[tuple[Any, ...]] = []
        self.tally = Tally()
        self.ending: list[asyncio.Task[Any]] = []
        self.network = Network(loop, self.random, Weather())
        self.network.trace = self.trace
        self.store = Store(loop.clock)
        self.store.listeners = InOrder()  # type: ignore[assignment]
        self.kv = Kv(loop, self.random, MemoryNetwork(loop.clock, self._kv_faults))
        self.playing = False  # until every pair has found itself nothing is ill
        self.lives = dict.fromkeys(script.names, 0)
        self.instances: dict[str, Instance] = {}
        self.all_instances: list[Instance] = []
        self.masters = {
            name: Master(self, name, 7001 - number)
            for number, name in enumerate(MASTERS[: script.num_masters], start=1)
        }
        self.told = [Told(ask=ask) for ask in script.asks]

    def trace(self, *words: Any) -> None:
        """Note what happened; the same seed must note the same."""
        self.words.append((round(self.loop.time(), 9), *words))

    def _kv_faults(self, _giver: str, _taker: str) -> Faults:
        script, random = self.script, self.random
        if not self.playing or not script.kv_fault or random.random() > script.kv_fault_share:
            return Faults()
        match script.kv_fault:
            case "late":
                return Faults(delay_s=random.choice((0.005, 0.05, 0.4)))
            case "cut":
                return Faults(cut_at_byte=random.randrange(2500))
            case "lost":
                return Faults(lose_frames=frozenset({random.randrange(12)}))
            case "flipped":
                return Faults(flip_at_byte=random.randrange(2500))
            case _:
                return Faults(lose_replies=True)

    # ---- the cluster's life ----

    async def start(self) -> None:
        """Masters and instances, until every pair is linked at each."""
        for master in self.masters.values():
            await self._begin(master.start(), master.process)
        for name in self.script.names:
            self.give_birth(name)
        end = self.loop.time() + START_S
        for master in self.masters.values():
            links = master.parts.links
            while len(links.linked()) < (len(self.script.names) // 2) ** 2:
                if self.loop.time() >= end:
                    raise Wrong(f"the cluster does not find itself: {links.unlinked()}")
                await asyncio.sleep(0.005)

    def _begin(self, work: Any, process: Process) -> asyncio.Task[Any]:
        task = self.loop.create_task(work, context=process.context)
        task.add_done_callback(self._on_begun)
        return task

    def _on_begun(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.loop.failures.append(repr(task.exception()))

    def give_birth(self, name: str) -> None:
        """A new life of an instance."""
        self.lives[name] += 1
        self.trace("birth", name, self.lives[name])
        instance = Instance(self, name, self.lives[name])
        self.instances[name] = instance
        self.all_instances.append(instance)
        self._begin(instance.start(), instance.process)

    # ---- what befalls it ----

    def play(self) -> list[asyncio.Task[None]]:
        """Set the script's weather and events going; returns the clients."""
        self.network.weather = self.script.weather
        self.playing = True
        for link in self.kv.network.links:  # opened by the first probes, when nothing was ill
            link.faults = self._kv_faults(link.giver.incarnation, link.taker.incarnation)
        for event in self.script.events:
            self.loop.call_later(event.at, self._befall, event)
        return [self._begin(self._client(told), self._asked(told).process) for told in self.told]

    def _asked(self, told: Told) -> Master:
        """The master of a client."""
        return self.masters[MASTERS[int(told.ask.name[1:]) % len(self.masters)]]

    def _befall(self, event: Event) -> None:
        self.trace(event.kind, event.who, event.other)
        instance = self.instances.get(event.who)
        match event.kind:
            case "kill master":
                self.masters[event.who].die()
            case "kill":
                assert instance is not None
                instance.die()
                self.loop.call_later(event.lasts_s, self.give_birth, event.who)
            case "cut":
                self.network.cut(event.who, event.other, event.lasts_s)
            case "kv cut":
                self.kv.cut(event.who, event.other)
            case "stall":
                assert instance is not None
                self._stall(instance.engine, event.lasts_s)
            case "drain":
                assert instance is not None
                self._begin(instance.drain(), instance.process)
            case "flush":
                assert instance is not None
                self._begin(instance.flush(), instance.process)

    def _stall(self, engine: Engine, lasts_s: float) -> None:
        """Its next step takes so long."""
        usual = engine.step_s

        def slow() -> float:
            engine.step_s = usual
            return lasts_s

        engine.step_s = slow

    # ---- the clients ----

    async def _client(self, told: Told) -> None:
        try:
            await self._ask(told)
        except asyncio.CancelledError:  # its master died
            told.left, told.ends = True, 1
            raise

    async def _ask(self, told: Told) -> None:
        ask = told.ask
        await asyncio.sleep(ask.at)
        reading = self.loop.create_task(self._read(told))
        if ask.leaves_after_s is not None:
            self.loop.call_later(ask.leaves_after_s, reading.cancel)
        await asyncio.wait([reading])
        if reading.cancelled():
            told.left = True
            told.ends += 1
        self.trace("end", ask.name, told.error, told.left)

    async def _read(self, told: Told) -> None:
        ask = told.ask
        submission = Submission(
            request_id=ask.name,
            prompt_ids=ask.prompt,
            sampling=sampling_of(ask),
            timeout_s=ask.timeout_s,
            model="toy",
            cache_salt=ask.salt,
            priority=ask.priority,
            offline=ask.offline,
        )
        try:
            backend = self._asked(told).parts.backend
            async with contextlib.aclosing(backend.generate(submission)) as source:
                async for delta in source:
                    self._hear(told, delta)
        except RequestError as error:
            told.error = error.code
        told.ends += 1

    def _hear(self, told: Told, delta: Delta) -> None:
        self.trace("delta", told.ask.name, delta.choice, delta.position, *delta.token_ids)
        tokens = told.choices.setdefault(delta.choice, [])
        if delta.position != len(tokens):
            told.wrong = f"choice {delta.choice} at {delta.position} after {len(tokens)} tokens"
        if delta.choice in told.finishes:
            told.wrong = f"choice {delta.choice} goes on after its end"
        tokens += delta.token_ids
        if delta.finish_reason:
            told.finishes[delta.choice] = delta.finish_reason

    # ---- the end ----

    def open_things(self) -> dict[str, Any]:
        """Everything that is not empty yet, by owner."""
        found: dict[str, Any] = {
            name: things
            for name, instance in self.instances.items()
            if (things := instance.open_things())
        }
        given = sum(instance.engine.num_given for instance in self.instances.values())
        if given:
            found["grants given"] = given
        found |= {
            name: things
            for name, master in self.masters.items()
            if (things := master.open_things())
        }
        return found

    async def close(self) -> None:
        """End every process."""
        for instance in self.all_instances:
            instance.die()
        for master in self.masters.values():
            master.die()
        current = asyncio.current_task()
        ending = [task for task in self.ending if task is not current]
        if ending:
            await asyncio.wait(ending)
        assert PROCESS.get(None) is None
