"""Puts the rooms of a master together once the cluster key is known; no port is opened here. Called by the daemon and by tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base.clock import Clock
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.membership import Patience
from xllm_py.control.channels import Channels
from xllm_py.control.server import join_address
from xllm_py.master.admin import AdminRoutes
from xllm_py.master.cluster_backend import ClusterBackend
from xllm_py.master.config import MasterConfig
from xllm_py.master.dispatcher import Dispatcher, Terms
from xllm_py.master.election import Election
from xllm_py.master.generations import Generations
from xllm_py.master.instance_manager import InstanceManager
from xllm_py.master.journeys import Journeys
from xllm_py.master.links import Links
from xllm_py.master.peers import Peers
from xllm_py.master.recall import recall
from xllm_py.master.roles import Roles
from xllm_py.master.router import Policy, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """This life of the master."""

    incarnation: str
    cluster_key: bytes
    rpc_address: str  # as announced


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One master, without its ports."""

    manager: InstanceManager
    peers: Peers
    links: Links
    router: Router
    generations: Generations
    journeys: Journeys
    backend: ClusterBackend
    election: Election
    roles: Roles
    routes: AdminRoutes


def announced(config: MasterConfig, port: int) -> str:
    """host:port as others dial it."""
    return join_address(config.advertise_host, port)


def _manager(
    config: MasterConfig, identity: Identity, clock: Clock, metrics: Metrics
) -> InstanceManager:
    return InstanceManager(
        cluster_key=identity.cluster_key,
        clock=clock,
        metrics=metrics,
        patience=_patience(config),
        forget_gone_after_s=config.forget_gone_after_s,
    )


def _policy(config: MasterConfig, identity: Identity) -> Policy:
    return Policy(
        name=config.load_balance_policy,
        ttft_s=config.target_ttft_s,
        tpot_s=config.target_tpot_s,
        cluster_key=identity.cluster_key,
        prefix_seed=config.prefix_seed,
    )


def _patience(config: MasterConfig) -> Patience:
    return Patience(suspect_after_s=config.suspect_after_s, gone_after_s=config.gone_after_s)


def _peers(config: MasterConfig, identity: Identity, tasks: TaskFamily) -> Peers:
    return Peers(
        tasks=tasks,
        cluster_key=identity.cluster_key,
        sender=identity.incarnation,
        timeout_s=config.rpc_timeout_s,
        channels=Channels(connect_timeout_s=config.connect_timeout_s, tls=config.tls),
    )


def _election(identity: Identity, manager: InstanceManager, metrics: Metrics) -> Election:
    return Election(
        address=identity.rpc_address,
        cluster_key=identity.cluster_key,
        seen_by_instances=lambda: manager.highest_term,
        metrics=metrics,
    )


def _terms(config: MasterConfig, identity: Identity) -> Terms:
    return Terms(
        address=identity.rpc_address,
        relay=not config.decode_response_to_service,
        max_attempts=config.max_attempts,
        queue_timeout_s=config.queue_timeout_s,
        max_queue_size=config.http.max_queue_size,
    )


def assemble(
    config: MasterConfig,
    identity: Identity,
    *,
    clock: Clock,
    metrics: Metrics,
    tasks: TaskFamily,
    num_streams: Callable[[], int],
) -> Parts:
    """Make and connect everything."""
    manager = _manager(config, identity, clock, metrics)
    peers = _peers(config, identity, tasks)

    def forget(card: Card) -> None:
        tasks.start(peers.forget(card), name=f"forget {card.name}")

    manager.on_forgotten.append(forget)
    generations = Generations(manager=manager, metrics=metrics)
    links = Links(manager=manager, peers=peers, tasks=tasks, metrics=metrics)
    generations.on_handoff_lost.append(links.doubt)
    router = Router(manager=manager, links=links, metrics=metrics, policy=_policy(config, identity))
    generations.on_beat = router.on_heartbeat
    election = _election(identity, manager, metrics)
    roles = Roles(manager=manager, router=router, election=election, metrics=metrics)
    generations.order = roles.order
    journeys = Journeys()
    dispatcher = Dispatcher(
        router=router,
        generations=generations,
        peers=peers,
        tasks=tasks,
        clock=clock,
        metrics=metrics,
        terms=_terms(config, identity),
    )
    remember = functools.partial(recall, manager, peers)
    backend = ClusterBackend(router, dispatcher, journeys, remember, clock)
    return Parts(
        manager=manager,
        peers=peers,
        links=links,
        router=router,
        generations=generations,
        journeys=journeys,
        backend=backend,
        election=election,
        roles=roles,
        routes=AdminRoutes(
            manager=manager,
            links=links,
            router=router,
            journeys=journeys,
            peers=peers,
            roles=roles,
            counts=lambda: {
                **dispatcher.counts(),
                "streams": num_streams(),
            },
        ),
    )
