"""A master without HTTP over the memory registry, and instances that say what a test tells them to, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from tests.ports import free_port
from xllm_py.base import ids
from xllm_py.base.clock import RealClock
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.duties import Fence
from xllm_py.cluster.instance_info import Card, Role, card_key, card_to_json
from xllm_py.control.client import GenerationsStream, MasterClient
from xllm_py.control.server import ControlServer, require_free, serve_instance, serve_master
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.service_config import EtcdSlice, HttpSlice, LogSlice
from xllm_py.master.config import MasterConfig
from xllm_py.master.parts import Identity, Parts, assemble
from xllm_py.openai.backend import Delta, Told
from xllm_py.registry.memory import MemoryRegistry, Store
from xllm_py.wire.control_messages import (
    GenerationsDown,
    GenerationsUp,
    Heartbeat,
    HeartbeatReply,
    LinkHealth,
    no_verdicts,
)
from xllm_py.wire.messages import Verdicts

KEY = b"k" * 32
WAIT_S = 10.0


async def until(what: str, condition: Callable[[], Any]) -> Any:
    """Wait until the condition is true; the message says what was awaited."""
    clock = RealClock()
    deadline = clock.now() + WAIT_S
    while True:
        value = condition()
        if value:
            return value
        if clock.now() > deadline:
            raise AssertionError(f"waited {WAIT_S} s for {what}")
        await asyncio.sleep(0.005)


def submission(request_id: str = "r1", **fields: Any) -> Submission:
    """Three prompt tokens; at most 8 to generate."""
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 8), seed=1)
    values = {"prompt_ids": (1, 2, 3), "timeout_s": WAIT_S, "model": "m", **fields}
    return Submission(request_id=request_id, sampling=sampling, **values)


class FakeInstance:
    """One instance: it notes what it is asked, and speaks when told to."""

    def __init__(self, master: RunningMaster, name: str, role: Role, **card: Any) -> None:
        self.master = master
        self.incarnation = ids.incarnation_id()
        facts = {"max_model_len": 100, "vocab_size": 50, "num_blocks": 10, "block_size": 16}
        self.card = Card(
            name=name,
            rpc_address="",
            type=role.value,
            incarnation_id=self.incarnation,
            served_names=("m",),
            **{**facts, **card},
        )
        self.submissions: list[Submission] = []
        self.said: dict[str, dict[str, Any]] = {}  # by stream id
        self.asked: list[str] = []
        self.cancelled: list[tuple[str, int]] = []
        self.linked: list[bytes] = []
        self.unlinked: list[tuple[str, str]] = []
        self.downs: list[GenerationsDown] = []
        self.known: list[bool] = []
        self.submit_error: Exception | None = None
        self.link_error: Exception | None = None
        self.probed: list[bytes] = []
        self.fetched: list[bytes] = []
        self.probe_error: Exception | None = None
        self.health = LinkHealth(works=True, round_trip_s=0.001, bytes_per_s=2e9)
        self.hang_on_submit = False
        self.beating = True
        self.fence = Fence()
        self._sequence = 0
        self._tasks = TaskFamily(name)
        self._server: ControlServer | None = None
        self._client: MasterClient | None = None
        self._stream: GenerationsStream | None = None

    async def start(self, *, beating: bool = True) -> FakeInstance:
        """Serve, put the card, open the stream, send heartbeats."""
        self.beating = beating
        self._server = await serve_instance(
            self,
            host="127.0.0.1",
            port=0,
            may_move=False,
            cluster_key=KEY,
            incarnation=self.incarnation,
        )
        self.card = dataclasses.replace(self.card, rpc_address=self._server.address)
        await self.put_card()
        self._client = MasterClient(
            self.master.address, cluster_key=KEY, sender=self.incarnation, timeout_s=5.0
        )
        self._tasks.start(self._beat(self._client), name="heartbeats")
        if beating:
            await self.open_stream()
        return self

    async def put_card(self) -> None:
        raw = card_to_json(self.card, card_key(KEY))
        await self.master.registry.put(keys.instance(self.card.role, self.card.name), raw)

    async def open_stream(self) -> None:
        """Begin, or come back after `cut_stream`."""
        self.beating = True
        self._stream = GenerationsStream(
            self.master.address, "master", cluster_key=KEY, sender=self.incarnation
        )
        await self._send(Outputs(), no_verdicts())
        self._tasks.start(self._listen(self._stream), name="downs")

    async def _listen(self, stream: GenerationsStream) -> None:
        with contextlib.suppress(Exception):
            async for down in stream:
                self.downs.append(down)

    async def _beat(self, client: MasterClient) -> None:
        sequence = 0
        while True:
            if self.beating:
                beat = Heartbeat(
                    name=self.card.name,
                    incarnation=self.incarnation,
                    sequence=sequence,
                    state=self.card.state,
                    role=self.card.role,
                    term=self.fence.term,
                    duty=self.fence.duty,
                )
                with contextlib.suppress(Exception):
                    reply: HeartbeatReply = await client.heartbeat(beat)
                    self.known.append(reply.known)
                    self.fence.hear(reply.term, reply.duty)
            sequence += 1
            await asyncio.sleep(0.05)

    async def _send(
        self, outputs: Outputs, verdicts: Verdicts, speaker: FakeInstance | None = None
    ) -> None:
        speaker = speaker or self
        assert self._stream is not None
        await self._stream.send(
            GenerationsUp(
                name=speaker.card.name,
                incarnation=speaker.incarnation,
                sequence=speaker._sequence,
                outputs=outputs,
                verdicts=verdicts,
            )
        )
        speaker._sequence += 1

    async def say(
        self,
        position: int,
        token_id: int,
        finish_reason: str = "",
        *,
        request_id: str = "r1",
        attempt: int = 1,
        message: str = "",
        journey: dict[str, float] | None = None,
        relayed_for: FakeInstance | None = None,
    ) -> None:
        """Report one entry; relayed_for: as the giver passes the taker's message on."""
        outputs = Outputs()
        entry = outputs.add(
            request_id, attempt, position=position, token_id=token_id, finish_reason=finish_reason
        )
        if message:
            outputs.messages[entry] = message
        if journey is not None:
            outputs.journeys[entry] = journey
            outputs.cached_tokens[entry] = 2
        await self._send(outputs, no_verdicts(), relayed_for)

    async def judge(self, kind: str, request_id: str = "r1") -> None:
        """Report how a handoff ended."""
        columns = ([request_id], [1], [kind], [""], [4096], [0.01], [0.002])
        names = ("request_ids", "attempts", "kinds", "reasons", "num_bytes", "seconds", "exposed")
        await self._send(Outputs(), Verdicts(**dict(zip(names, columns, strict=True))))  # type: ignore[arg-type]

    async def cut_stream(self) -> None:
        """Fall silent and end the Generations stream, as a dying process does."""
        self.beating = False
        assert self._stream is not None
        await self._stream.close()

    async def stop(self) -> None:
        """Everything ends."""
        await self._tasks.close()
        for closing in (self._stream, self._client, self._server):
            if closing is not None:
                await closing.close()

    # ---- InstanceHandlers ----

    async def submit(self, submission: Submission) -> None:
        self.submissions.append(submission)
        if self.hang_on_submit:
            await asyncio.sleep(WAIT_S)
        if self.submit_error is not None:
            raise self.submit_error

    async def add_new_requests(self, offers: list[Offer]) -> list[OfferAnswer]:
        raise NotImplementedError

    async def first_generation(self, firsts: list[FirstToken]) -> list[bool]:
        raise NotImplementedError

    async def link_instance(self, card_json: bytes) -> None:
        if self.link_error is not None:
            raise self.link_error
        self.linked.append(card_json)

    async def probe_peer(self, card_json: bytes, fetch: bool) -> LinkHealth:
        (self.fetched if fetch else self.probed).append(card_json)
        if self.probe_error is not None:
            raise self.probe_error
        return self.health

    async def unlink_instance(self, name: str, incarnation: str) -> None:
        self.unlinked.append((name, incarnation))

    async def cancel(self, request_ids: list[str], attempts: list[int], reason: str) -> list[str]:
        self.cancelled += zip(request_ids, attempts, strict=True)
        return ["running" for _ in request_ids]

    async def drain(self, mode: str, timeout_s: float) -> int:
        return 0

    async def describe(self, stream_id: str) -> dict[str, Any]:
        self.asked.append(stream_id)
        return self.said.get(stream_id, {})

    async def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        raise NotImplementedError
        yield


class RunningMaster:
    """The parts of a master and its rpc port."""

    def __init__(self, **config: Any) -> None:
        self.config = MasterConfig(
            tokenizer_path="",
            etcd=EtcdSlice(address=""),
            http=HttpSlice(max_concurrent_requests=100),
            log=LogSlice(),
            # a busy test machine must not look like a dead instance
            **{"suspect_after_s": 4.0, "gone_after_s": 5.0, **config},
        )
        self.store = Store(RealClock())
        self.registry = MemoryRegistry(self.store)
        self.metrics = Metrics()
        self.tasks = TaskFamily("master")
        self.parts: Parts
        self.address = ""
        self._server: ControlServer | None = None
        self._instances: list[FakeInstance] = []

    async def start(self) -> None:
        port = free_port()
        require_free("127.0.0.1", port, "--rpc_server_port")
        self.address = f"127.0.0.1:{port}"
        identity = Identity(
            incarnation=ids.incarnation_id(), cluster_key=KEY, rpc_address=self.address
        )
        self.parts = assemble(
            self.config,
            identity,
            clock=RealClock(),
            metrics=self.metrics,
            tasks=self.tasks,
            num_streams=lambda: 0,
        )
        self._server = await serve_master(
            self.parts.generations,
            host="127.0.0.1",
            port=port,
            may_move=False,
            cluster_key=KEY,
            incarnation=identity.incarnation,
        )
        await self.parts.manager.begin(self.registry)
        self.tasks.start(self.parts.manager.follow(self.registry), name="registry")
        self.tasks.start(self.parts.manager.keep_time(), name="clock")

    async def stop(self) -> None:
        for instance in self._instances:
            await instance.stop()
        await self.tasks.close()
        await self.parts.peers.close()
        if self._server is not None:
            await self._server.close()

    async def add(
        self, name: str, role: Role, *, beating: bool = True, **card: Any
    ) -> FakeInstance:
        """Start an instance, and wait until the master knows it."""
        instance = FakeInstance(self, name, role, **card)
        self._instances.append(instance)
        await instance.start(beating=beating)
        await until(f"{name} to be known", lambda: self.state(instance))
        return instance

    async def be_elected(self) -> None:
        """Stand, and give duties from now on."""
        lease = await self.registry.lease(3)
        election = self.parts.election
        self.tasks.start(election.follow(self.registry), name="masters")
        self.tasks.start(election.stand(self.registry, lease, 3), name="election")
        await until("the election", lambda: election.leads)
        self.tasks.start(self.parts.roles.keep(), name="roles")

    async def pair(self) -> tuple[FakeInstance, FakeInstance]:
        """One P and one D, linked."""
        prefill = await self.add("p", Role.PREFILL)
        decode = await self.add("d", Role.DECODE)
        await self.mode("pd")
        return prefill, decode

    async def mode(self, mode: str) -> None:
        """Wait until the master serves in a mode."""
        await until(f"mode {mode or 'none'}", lambda: self.parts.backend.ready().mode == mode)

    def state(self, instance: FakeInstance) -> str:
        """As the master sees it; empty when unknown."""
        member = self.parts.manager.member(instance.incarnation)
        return member.view.state.value if member is not None else ""

    def ledger(self) -> dict[str, int]:
        return self.parts.generations.ledger()

    def read(self, order: Submission, told: Told | None = None) -> Reader:
        """Begin to read an answer."""
        return Reader(self, order, told)


class Reader:
    """A client: it reads deltas in a task of its own."""

    def __init__(self, master: RunningMaster, order: Submission, told: Told | None) -> None:
        self.deltas: list[Delta] = []
        self.task = master.tasks.start(
            self._read(master.parts.backend.generate(order, told)), name=f"read {order.request_id}"
        )

    async def _read(self, source: AsyncGenerator[Delta, None]) -> None:
        async with contextlib.aclosing(source):
            async for delta in source:
                self.deltas.append(delta)

    @property
    def ids(self) -> list[int]:
        """All tokens so far."""
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def error(self) -> BaseException | None:
        """What ended it, once it has ended."""
        return self.task.exception()

    async def ended(self) -> None:
        """Wait for its end, whatever it is."""
        await until("the answer's end", self.task.done)

    async def leave(self) -> None:
        """The client goes away."""
        self.task.cancel()
        await until("the reader's end", self.task.done)


@contextlib.asynccontextmanager
async def running_master(**config: Any) -> AsyncIterator[RunningMaster]:
    """A master that is stopped at the end with all its instances."""
    master = RunningMaster(**config)
    await master.start()
    try:
        yield master
    finally:
        await master.stop()
