"""The life of `xllm`: HTTP port bound -> registry and cluster key -> engine -> control port -> card -> ready. Owns the signals.

First SIGTERM or SIGINT: state DRAINING in the card, no new work, running requests end, then everything in reverse, exit 0; the
second: at once. The engine's death ends the daemon with exit code 7. Called by cli/xllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal

import uvloop

from xllm_py import __version__
from xllm_py.base import failpoints, ids, log
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import EngineDied, EngineDown, PeerUnavailable, RegistryUnavailable
from xllm_py.base.metrics import Metrics
from xllm_py.base.notify import feed_watchdog, notify
from xllm_py.base.process import stay
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.server import require_free
from xllm_py.instance.card import Identity
from xllm_py.instance.config import InstanceConfig
from xllm_py.instance.health import Health
from xllm_py.instance.parts import Parts, Routed, routed_parts
from xllm_py.instance.routes import InstanceRoutes
from xllm_py.openai.app import App
from xllm_py.openai.chat_template import ChatTemplate, load_chat_template
from xllm_py.openai.server import HttpServer, serve_http
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import Tokenizer, load_tokenizer
from xllm_py.registry import open_registry
from xllm_py.registry.base import Registry
from xllm_py.registry.cluster_key import cluster_key_of, keep_cluster_key

_log = log.get(__name__)
_POLL_S = 0.05
_KEY_PATIENCE_S = (
    4.0  # who has the key looks again for a registry that went away every three seconds at most
)


class Instance:
    """One instance process. `start`, then `serve` until a signal, then `close` whatever happened."""

    def __init__(
        self, config: InstanceConfig, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> None:
        self._config = config
        self._clock = RealClock()
        self._tasks = TaskFamily("instance")
        self._parts = Parts(config, clock=self._clock, tasks=self._tasks, metrics=Metrics())
        self._health = Health(self._parts.engine, self._clock, config.stalled_after_s)
        self._parts.ready = self._health.readiness
        routes = InstanceRoutes(self._parts)
        self._app = App(
            self._parts.backend,
            tokenizer,
            template,
            settings=_settings(config),
            metrics=self._parts.metrics,
            clock=self._clock,
            extra_routes=routes.table(),
        )
        self._closers = contextlib.AsyncExitStack()
        self._drain_timeout_s = config.http.drain_timeout_s
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._starting: asyncio.Task[object] | None = None
        self._routed: Routed | None = None

    @property
    def stopping(self) -> bool:
        """Whether a signal came."""
        return self._stop.is_set()

    async def start(self) -> None:
        """Everything up to the ready line. Raises StartError leaves; a signal meanwhile cancels it."""
        config = self._config
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, log.on_hangup)
        self._closers.push_async_callback(self._tasks.close)
        host, port = config.addresses.host, config.addresses.port
        http = await serve_http(self._app, host, port, tls=config.cluster.tls)
        self._closers.push_async_callback(http.close)
        _require_ports(config)
        registry = await self._open_registry()
        key = config.cluster.cluster_key
        if registry is not None and not key:
            key = await cluster_key_of(registry, patience_s=_KEY_PATIENCE_S)
            self._tasks.start(keep_cluster_key(registry, key), name="cluster key")
        failpoints.arm(config.engine.failpoints, key)
        identity = Identity(
            incarnation=ids.incarnation_id(),
            cluster_key=key,
            http_port=http.port,
            started_ms=int(self._clock.wall() * 1000),
        )
        self._closers.push_async_callback(self._parts.engine.close)
        notify("STATUS=loading the model")
        ready = await self._parts.engine.start(
            dataclasses.replace(config.engine, incarnation=identity.incarnation, cluster_key=key),
            timeout_s=config.engine_start_timeout_s,
        )
        for line in ready.summary:
            (_log.warning if line.startswith("warning") else _log.info)(line)
        self._parts.on_engine_ready(ready)
        if registry is not None:
            await self._join(registry, identity)
        stay()
        self._health.loaded = True
        self._starting = None
        notify("READY=1")
        self._tasks.start(feed_watchdog(self._health.moves), name="watchdog")
        self._tell_ready(http)

    def _tell_ready(self, http: HttpServer) -> None:
        ready, role = self._parts.engine_ready, self._config.cluster.role
        control = self._routed.control.address if self._routed is not None else "none"
        _log.info(
            "ready",
            role=role.name,
            model=self._config.served_names[0],
            http=http.port,
            control=control,
            kv=",".join(ready.kv_endpoints) or "none",
            device=ready.device,
            dtype=ready.dtype,
        )

    async def _open_registry(self) -> Registry | None:
        if not self._config.cluster.routed:
            return None
        registry = await open_registry(self._config.cluster.etcd, self._clock)
        self._closers.push_async_callback(registry.close)
        return registry

    async def _join(self, registry: Registry, identity: Identity) -> None:
        """Control port, card, masters."""
        routed = await routed_parts(self._parts, registry, identity, drain=self._drain_by_call)
        self._routed = routed
        self._closers.push_async_callback(routed.peers.close)
        self._closers.push_async_callback(routed.control.close)
        await routed.announcer.announce(routed.card("READY"))
        self._closers.push_async_callback(routed.announcer.withdraw)
        self._tasks.start(routed.masters.follow(registry), name="masters", vital=True)

    def _on_signal(self, number: signal.Signals) -> None:
        _log.info("signal", name=signal.Signals(number).name, again=self._stop.is_set())
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()
        if self._starting is not None:
            self._starting.cancel()

    async def _drain_by_call(self, timeout_s: float) -> None:
        """A master or an operator asks for it: as on SIGTERM, the process ends when it is empty, or after so long."""
        self._drain_timeout_s = timeout_s
        self._stop.set()

    async def serve(self) -> int:
        """Until a signal, or until a vital part failed. Returns the exit code."""
        failed = self._tasks.start(self._tasks.wait_failed(), name="failure")
        stopped = self._tasks.start(self._stop.wait(), name="stop")
        await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            error = failed.result()
            self._parts.outlets.fail_all(EngineDown("the engine of this instance died"))
            _log.error("the instance stops because a part of it failed", reason=str(error))
            await self._tasks.close(
                timeout_s=1.0
            )  # masters see it by their streams, so these end before all else
            return error.exit_code if isinstance(error, EngineDied) else 1
        notify("STOPPING=1")
        drained = self._tasks.start(self._drain(), name="drain")
        hurried = self._tasks.start(self._stop_now.wait(), name="second signal")
        await asyncio.wait((drained, hurried, failed), return_when=asyncio.FIRST_COMPLETED)
        return 0

    async def _drain(self) -> None:
        """No new work; until everything has ended, or drain_timeout_s."""
        parts, limit_s = self._parts, self._drain_timeout_s
        self._health.draining = True
        self._app.begin_drain()
        with contextlib.suppress(EngineDown, PeerUnavailable):
            parts.engine.drain()
        if self._routed is not None:
            self._routed.service.draining = True
            try:
                await self._routed.announcer.announce(self._routed.card("DRAINING"))
            except RegistryUnavailable as error:
                _log.warning("card not changed", reason=error.message)
        deadline = self._clock.now() + limit_s
        while parts.num_busy() and self._clock.now() < deadline:  # noqa: ASYNC110  two owners, no common event
            await asyncio.sleep(_POLL_S)
        if parts.num_busy():
            _log.warning("requests cut off", open=parts.num_busy(), after_s=limit_s)

    async def close(self) -> None:
        """Everything in reverse order of its start."""
        await self._closers.aclose()
        _log.info("stopped")


def _require_ports(config: InstanceConfig) -> None:
    """Ports given by hand never move: say that one is taken before a model is loaded. Raises PortInUse."""
    addresses, engine = config.addresses, config.engine
    if config.cluster.routed and not addresses.disagg_pd_port_may_move:
        require_free(addresses.host, addresses.disagg_pd_port, "--disagg_pd_port")
    if engine.kv_listen and not engine.kv_port_may_move:
        require_free(engine.kv_host, engine.kv_port, "--transfer_listen_port")


def _settings(config: InstanceConfig) -> HttpSettings:
    http = config.http
    return HttpSettings(
        max_concurrent_requests=http.max_concurrent_requests,
        max_body_bytes=http.max_body_bytes,
        max_best_of=http.max_best_of,
        max_logprobs=http.max_logprobs,
        request_timeout_s=http.request_timeout_s,
        debug_endpoints=http.debug_endpoints,
        serve_metrics=http.metrics,
        idle_connection_s=http.idle_connection_s,
        api_keys=http.api_keys,
        random_seed=config.random_seed,
        allowed_hosts=http.allowed_hosts | {config.addresses.host, config.addresses.advertise_host},
    )


async def _live(config: InstanceConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> int:
    instance = Instance(config, tokenizer, template)
    try:
        await instance.start()
        return await instance.serve()
    except asyncio.CancelledError:
        if not instance.stopping:
            raise
        return 0  # told to stop while it started
    finally:
        await instance.close()


def run(config: InstanceConfig) -> int:
    """Serve until told to stop; the exit code. Raises StartError leaves."""
    log.setup(
        level="debug" if config.log.verbose else config.log.level,
        form=config.log.form,
        directory=config.log.directory,
        program="xllm",
    )
    for warning in config.warnings:
        _log.warning(warning)
    _log.info("starting", version=__version__, flags=config.given)
    tokenizer = load_tokenizer(config.model_path)
    template = load_chat_template(config.model_path, special_tokens=tokenizer.special_tokens)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_live(config, tokenizer, template))
    finally:
        if template is not None:
            template.close()
