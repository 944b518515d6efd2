"""Puts the rooms of an instance together. `Parts` is what every instance has; `Routed` what one in a cluster has beside it.

Made by the daemon, which owns the order of start and stop; no port is opened here but the control port, in `routed_parts`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.duties import Fence
from xllm_py.cluster.instance_info import Card, Role
from xllm_py.cluster.load import Load, Progress
from xllm_py.cluster.prefix_index import CacheLog
from xllm_py.control.client import GenerationsStream, MasterClient
from xllm_py.control.server import ControlServer, join_address, serve_instance
from xllm_py.core.plan import Outputs
from xllm_py.core.request import Submission
from xllm_py.instance.announcer import Announcer
from xllm_py.instance.card import Identity, make_card
from xllm_py.instance.config import InstanceConfig
from xllm_py.instance.control_service import ControlService
from xllm_py.instance.engine_link import EngineHandlers
from xllm_py.instance.engine_measures import EngineMeasures
from xllm_py.instance.generations import Generations
from xllm_py.instance.local_backend import LocalBackend
from xllm_py.instance.masters import Masters
from xllm_py.instance.outlets import Destination, Outlets
from xllm_py.instance.peers import Peers, identified
from xllm_py.instance.records import Records
from xllm_py.instance.relay import Relay
from xllm_py.instance.replicas import make_engine
from xllm_py.instance.token_logs import TokenLogs
from xllm_py.openai.backend import Readiness, ServedModel
from xllm_py.registry.base import Registry
from xllm_py.wire import messages as m
from xllm_py.wire.control_messages import Heartbeat, HeartbeatReply

_log = log.get(__name__)


class Parts:
    """What every instance has: an engine, outlets, a backend for its own door."""

    def __init__(
        self, config: InstanceConfig, *, clock: Clock, tasks: TaskFamily, metrics: Metrics
    ) -> None:
        self.config = config
        self.clock = clock
        self.tasks = tasks
        self.metrics = metrics
        self.routed: Routed | None = None
        self.engine_ready = m.Ready()  # nothing, before it is loaded
        self.ready: Callable[[], Readiness] = lambda: Readiness(ready=False, reasons=("loading",))
        self.records = Records(clock)
        self.token_logs = TokenLogs(clock)
        self.outlets = Outlets(self._send, self.token_logs)
        handlers = EngineHandlers(
            on_outputs=self.outlets.on_outputs,
            on_offers=lambda offers: self._in_cluster().peers.on_offers(offers),
            on_first_tokens=lambda out: self._in_cluster().peers.on_first_tokens(out),
            on_cancels=lambda out: self._in_cluster().peers.on_cancels(out),
            on_verdicts=lambda verdicts: self._in_cluster().on_verdicts(verdicts),
            on_reservations_ended=self.outlets.on_reservations_ended,
            on_progress=self._on_progress,
        )
        self.engine = make_engine(config.num_replicas, handlers=handlers, tasks=tasks, clock=clock)
        self.cache_log = CacheLog()
        self._measures = EngineMeasures(metrics, lambda: self.engine.progress)
        self.backend = LocalBackend(
            engine=self.engine,
            outlets=self.outlets,
            models=self.models,
            ready=lambda: self.ready(),
            clock=clock,
            on_journey=self._on_journey,
        )

    def _in_cluster(self) -> Routed:
        if self.routed is None:
            raise ValueError("the engine speaks of peers, but this instance is in no cluster")
        return self.routed

    def _send(self, destination: Destination, outputs: Outputs) -> None:
        routed = self._in_cluster()
        routed.generations.send(destination, outputs)
        routed.relay.on_own_outputs(outputs)

    def _on_journey(self, submission: Submission, state: str, moments: dict[str, float]) -> None:
        self.records.put(submission.request_id, state, moments)

    def on_engine_ready(self, ready: m.Ready) -> None:
        """The model is loaded."""
        self.engine_ready = ready

    def models(self) -> tuple[ServedModel, ...]:
        """One model under each of its served names, once it is loaded."""
        ready = self.engine_ready
        if not ready.num_blocks:
            return ()
        return tuple(
            ServedModel(
                name=name,
                max_model_len=ready.max_model_len,
                vocab_size=ready.vocab_size,
                created=int(self.clock.wall()),
                fingerprint=ready.model_fingerprint[:12],
                sampling_defaults=self.config.sampling_defaults,
            )
            for name in self.config.served_names
        )

    def _on_progress(self, progress: m.Progress) -> None:
        self._measures.on_progress(progress)
        self.cache_log.note(progress.cached, progress.evicted)

    def card(self, identity: Identity, control_port: int, state: str) -> Card:
        """What we say of ourselves in this state."""
        return make_card(
            self.config, self.engine_ready, identity, control_port=control_port, state=state
        )

    def num_busy(self) -> int:
        """Requests that still run or are not yet acknowledged."""
        told = self.routed.generations.num_unacknowledged if self.routed is not None else 0
        return self.outlets.num_open + told

    def load(self) -> Load:
        """For heartbeats."""
        progress = self.engine.progress
        blocks = progress.blocks
        return Load(
            waiting_requests=progress.waiting,
            running_requests=progress.running,
            total_blocks=blocks.get("total", self.engine_ready.num_blocks),
            free_blocks=blocks.get("free", self.engine_ready.num_blocks) + blocks.get("cached", 0),
            reserved_blocks=blocks.get("staged", 0),
        )


@dataclass(slots=True, kw_only=True)
class Routed:
    """What an instance in a cluster has beside its Parts."""

    parts: Parts
    identity: Identity
    generations: Generations
    relay: Relay
    peers: Peers
    service: ControlService
    control: ControlServer
    announcer: Announcer
    masters: Masters
    state: str = "JOINING"
    fence: Fence = field(default_factory=Fence)

    def card(self, state: str) -> Card:
        """What we say of ourselves, from now on in this state."""
        self.state = state
        return self.parts.card(self.identity, self.control.port, state)

    def on_verdicts(self, verdicts: m.Verdicts) -> None:
        """How handoffs ended: to the masters; a landed request has left us."""
        for index, request_id in enumerate(verdicts.request_ids):
            destination = self.parts.outlets.destination(request_id)
            if destination is None:
                continue
            one = m.Verdicts(
                request_ids=[request_id],
                attempts=[verdicts.attempts[index]],
                kinds=[verdicts.kinds[index]],
                reasons=[verdicts.reasons[index]],
                num_bytes=[verdicts.num_bytes[index]],
                seconds=[verdicts.seconds[index]],
                exposed=[verdicts.exposed[index]],
            )
            self.generations.send_verdicts(destination, one)
            if verdicts.kinds[index] == "landed":
                self.parts.outlets.close(request_id, verdicts.attempts[index])

    def on_reply(self, reply: HeartbeatReply, sequence: int) -> None:
        """A master answered the heartbeat of this number."""
        if not reply.known and sequence:
            self.announcer.put_again()
        if self.fence.hear(reply.term, reply.duty):
            _log.info("duty", duty=self.fence.duty)

    def beat(self, sequence: int, cache_since: int) -> Heartbeat:
        """One heartbeat, with the news of the cache from a number on."""
        self.relay.expire()
        engine, now = self.parts.engine, self.parts.clock.now()
        busy = bool(engine.progress.waiting + engine.progress.running)
        return Heartbeat(
            name=self.generations.name,
            incarnation=self.identity.incarnation,
            sequence=sequence,
            state=self.state,
            role=self.parts.config.cluster.role,
            load=self.parts.load(),
            progress=Progress(
                steps=engine.progress.steps,
                tokens=engine.progress.tokens,
                step_age_s=now - engine.progress_at if busy else 0.0,
                announced_s=engine.progress.announced_s,
            ),
            links=self.service.links(),
            cache=self.parts.cache_log.news(cache_since),
            term=self.fence.term,
            duty=self.fence.duty,
        )


async def routed_parts(
    parts: Parts,
    registry: Registry,
    identity: Identity,
    *,
    drain: Callable[[float], Awaitable[None]],
) -> Routed:
    """Bind the control port and connect everything. Raises PortInUse."""
    config, key = parts.config, identity.cluster_key
    host = config.addresses.advertise_host
    name = join_address(host, identity.http_port)
    relay = Relay(parts.clock)
    announcer = Announcer(
        registry=registry, cluster_key=key, ttl_s=config.cluster.etcd.ttl_s, tasks=parts.tasks
    )

    generations = Generations(
        name=name,
        incarnation=identity.incarnation,
        connect=functools.partial(_connect, parts, identity),
        tasks=parts.tasks,
        clock=parts.clock,
        on_cancel=lambda ids, attempts: service.end(ids, attempts),
        on_relayed=relay.take,
        on_broken=relay.cut,
        on_rerouted=parts.outlets.reroute,
    )
    service = ControlService(
        engine=parts.engine,
        outlets=parts.outlets,
        generations=generations,
        relay=relay,
        card=lambda: parts.card(identity, control.port, "READY"),
        cluster_key=key,
        takes_handoffs=config.cluster.role is not Role.DEFAULT,
        tasks=parts.tasks,
        drain=drain,
        describe=functools.partial(_describe, parts, identity),
        token_logs=parts.token_logs,
    )
    control = await _open_control(parts, identity, service)
    routed = Routed(
        parts=parts,
        identity=identity,
        generations=generations,
        relay=relay,
        peers=_peers(parts, identity, announcer, name, join_address(host, control.port)),
        service=service,
        control=control,
        announcer=announcer,
        masters=_masters(
            parts,
            identity,
            generations,
            beat=lambda *numbers: routed.beat(*numbers),
            on_reply=lambda *said: routed.on_reply(*said),
        ),
    )
    parts.routed = routed
    return routed


def _connect(
    parts: Parts,
    identity: Identity,
    address: str,
    kind: Literal["master", "instance"],
    addressee: str,
) -> GenerationsStream:
    return GenerationsStream(
        address,
        kind,
        cluster_key=identity.cluster_key,
        sender=identity.incarnation,
        addressee=addressee,
        tls=parts.config.cluster.tls,
    )


async def _open_control(parts: Parts, identity: Identity, service: ControlService) -> ControlServer:
    addresses = parts.config.addresses
    return await serve_instance(
        service,
        host=addresses.host,
        port=addresses.disagg_pd_port,
        may_move=addresses.disagg_pd_port_may_move,
        cluster_key=identity.cluster_key,
        incarnation=identity.incarnation,
        tls=parts.config.cluster.tls,
    )


def _peers(
    parts: Parts, identity: Identity, announcer: Announcer, name: str, address: str
) -> Peers:
    return Peers(
        engine=lambda: parts.engine,
        card_json=announcer.signed,
        identify=functools.partial(
            identified, name=name, address=address, incarnation=identity.incarnation
        ),
        cluster_key=identity.cluster_key,
        incarnation=identity.incarnation,
        timeout_s=parts.config.cluster.rpc_timeout_s,
        tls=parts.config.cluster.tls,
        tasks=parts.tasks,
    )


def _masters(
    parts: Parts,
    identity: Identity,
    generations: Generations,
    *,
    beat: Callable[[int, int], Heartbeat],
    on_reply: Callable[[HeartbeatReply, int], None],
) -> Masters:
    cluster = parts.config.cluster
    return Masters(
        cluster_key=identity.cluster_key,
        client=lambda address: MasterClient(
            address,
            timeout_s=cluster.rpc_timeout_s,
            cluster_key=identity.cluster_key,
            sender=identity.incarnation,
            tls=cluster.tls,
        ),
        beat=beat,
        interval_s=cluster.heart_beat_interval_s,
        generations=generations,
        on_reply=on_reply,
        tasks=parts.tasks,
    )


async def _describe(parts: Parts, identity: Identity) -> dict[str, Any]:
    routed = parts.routed
    return {
        "card": dataclasses.asdict(
            parts.card(identity, routed.control.port if routed else 0, "READY")
        ),
        "state": routed.state if routed else "JOINING",
        "load": dataclasses.asdict(parts.load()),
        "ledger": await parts.engine.ledger(timeout_s=1.0),
    }
