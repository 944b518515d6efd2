"""The life of `xllm-master`: ports, registry, cluster key, service, drain. Called by cli/xllm_master; owns the signals.

ports bound -> registry (embedded when asked for) -> cluster key -> parts -> own record -> ready
first SIGTERM or SIGINT: refuse new requests, let open ones end, then everything in reverse; second: at once
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

import uvloop

from xllm_py import __version__
from xllm_py.base import failpoints, ids, log
from xllm_py.base.clock import Clock, RealClock
from xllm_py.base.metrics import Metrics
from xllm_py.base.notify import feed_watchdog, notify
from xllm_py.base.process import stay
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.service_info import ServiceRecord, service_to_json
from xllm_py.control.server import ControlServer, require_free, serve_master
from xllm_py.master.config import MasterConfig
from xllm_py.master.front import Front
from xllm_py.master.parts import Identity, Parts, announced, assemble
from xllm_py.openai.app import App
from xllm_py.openai.chat_template import ChatTemplate, load_chat_template
from xllm_py.openai.server import HttpServer, serve_http
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import Tokenizer, load_tokenizer
from xllm_py.registry import open_registry
from xllm_py.registry.base import Lease, Registry
from xllm_py.registry.cluster_key import cluster_key_of, keep_cluster_key

_log = log.get(__name__)


class Master:
    """One master process. `start`, then `serve` until a signal, then `close` whatever happened."""

    def __init__(
        self, config: MasterConfig, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> None:
        self._config = config
        self._clock: Clock = RealClock()
        self._metrics = Metrics()
        self._tasks = TaskFamily("master")
        self._front = Front()
        self._app = App(
            self._front,
            tokenizer,
            template,
            settings=_settings(config),
            metrics=self._metrics,
            clock=self._clock,
            extra_routes=self._front.table(),
        )
        self._closers = contextlib.AsyncExitStack()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._starting: asyncio.Task[object] | None = None
        self._http: HttpServer | None = None
        self._failures: tuple[asyncio.Task[BaseException], ...] = ()

    async def start(self) -> None:
        """Everything up to the ready line. Raises StartError leaves; a signal meanwhile cancels it."""
        config = self._config
        self._starting = asyncio.current_task()
        self._take_signals()
        failed = self._tasks.start(self._tasks.wait_failed(), name="failure")
        http = await serve_http(
            self._app, config.host, config.http_port, flag="--http_server_port", tls=config.tls
        )
        http_failed = self._tasks.start(http.wait_failed(), name="http failure")
        self._failures = (failed, http_failed)
        self._http = http
        require_free(config.host, config.rpc_port, "--rpc_server_port")
        registry = await self._open_registry()
        cluster_key = config.cluster_key
        if not cluster_key:
            cluster_key = await cluster_key_of(registry)
            self._tasks.start(keep_cluster_key(registry, cluster_key), name="cluster key")
        failpoints.arm(config.failpoints, cluster_key)
        identity = Identity(
            incarnation=ids.incarnation_id(),
            cluster_key=cluster_key,
            rpc_address=announced(config, config.rpc_port),
        )
        parts = assemble(
            config,
            identity,
            clock=self._clock,
            metrics=self._metrics,
            tasks=self._tasks,
            num_streams=lambda: self._app.num_open,
        )
        self._closers.push_async_callback(parts.peers.close)
        self._closers.push_async_callback(self._tasks.close)
        rpc = await self._serve_rpc(parts, identity)
        self._closers.push_async_callback(parts.backend.close)
        await parts.manager.begin(registry)
        self._tasks.start(parts.manager.follow(registry), name="registry", vital=True)
        self._tasks.start(parts.manager.keep_time(), name="clock", vital=True)
        lease = await self._announce(registry, identity, http)
        self._tasks.start(parts.election.follow(registry), name="masters", vital=True)
        standing = parts.election.stand(registry, lease, config.etcd.ttl_s)
        self._tasks.start(standing, name="election", vital=True)
        self._tasks.start(parts.roles.keep(), name="roles", vital=True)
        stay()
        self._front.open(parts.backend, parts.routes)
        self._starting = None
        notify("READY=1")
        # a loop that stands still feeds nobody, which is what the watchdog is for
        self._tasks.start(feed_watchdog(lambda: True), name="watchdog")
        _log.info("ready", http=http.port, rpc=rpc.port, etcd=config.etcd.address)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, log.on_hangup)

    def _on_signal(self, number: signal.Signals) -> None:
        _log.info("signal", name=signal.Signals(number).name, again=self._stop.is_set())
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()
        if self._starting is not None:
            self._starting.cancel()

    async def _open_registry(self) -> Registry:
        config = self._config
        if config.embedded_etcd:
            from xllm_py.registry.embedded import NOTICE, serve_embedded

            _log.warning(NOTICE)
            embedded = await serve_embedded(config.etcd.address, clock=self._clock)
            self._closers.push_async_callback(embedded.close)
        registry = await open_registry(config.etcd, self._clock)
        self._closers.push_async_callback(registry.close)
        return registry

    async def _serve_rpc(self, parts: Parts, identity: Identity) -> ControlServer:
        rpc = await serve_master(
            parts.generations,
            host=self._config.host,
            port=self._config.rpc_port,
            may_move=False,
            cluster_key=identity.cluster_key,
            incarnation=identity.incarnation,
            tls=self._config.tls,
        )
        self._closers.push_async_callback(rpc.close)
        return rpc

    async def _announce(self, registry: Registry, identity: Identity, http: HttpServer) -> Lease:
        """Our own record, so that instances find us; the lease it stands under."""
        lease = await registry.lease(self._config.etcd.ttl_s)
        self._closers.push_async_callback(lease.revoke)
        http_address = announced(self._config, http.port)
        record = ServiceRecord(
            name=identity.rpc_address,
            rpc_address=identity.rpc_address,
            http_address=http_address,
            incarnation_id=identity.incarnation,
            version=__version__,
        )
        raw = service_to_json(record, identity.cluster_key)
        await lease.put(keys.service(identity.rpc_address), raw)
        return lease

    @property
    def stopping(self) -> bool:
        """Whether a signal came."""
        return self._stop.is_set()

    async def serve(self) -> int:
        """Until a signal, or until a vital task failed. Returns the exit code."""
        stopped = self._tasks.start(self._stop.wait(), name="stop")
        await asyncio.wait((*self._failures, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            reasons = [str(task.result()) for task in self._failures if task.done()]
            _log.error("the master stops because a part of it failed", reasons=reasons)
            return 1
        notify("STOPPING=1")
        await self._drain()
        return 0

    async def _drain(self) -> None:
        self._app.begin_drain()
        if self._app.num_open:
            _log.info(
                "draining", open=self._app.num_open, limit_s=self._config.http.drain_timeout_s
            )
        drained = self._tasks.start(
            self._app.drained(self._config.http.drain_timeout_s), name="drain"
        )
        hurried = self._tasks.start(self._stop_now.wait(), name="second signal")
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """The door first, so that open requests end and are cancelled at the instances; then the rest in reverse order."""
        if self._http is not None:
            await self._http.close()
        await self._closers.aclose()
        await self._tasks.close()
        _log.info("stopped")


def _settings(config: MasterConfig) -> HttpSettings:
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
        allowed_hosts=http.allowed_hosts | {config.host, config.advertise_host},
    )


async def _live(config: MasterConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> int:
    """Start, serve, close; the exit code. Raises StartError leaves."""
    master = Master(config, tokenizer, template)
    try:
        await master.start()
        return await master.serve()
    except asyncio.CancelledError:
        if not master.stopping:
            raise
        return 0  # told to stop while it started
    finally:
        await master.close()


def run(config: MasterConfig) -> int:
    """Serve until told to stop; the exit code. Raises StartError leaves."""
    log.setup(
        level="debug" if config.log.verbose else config.log.level,
        form=config.log.form,
        directory=config.log.directory,
        program="xllm-master",
    )
    for warning in config.warnings:
        _log.warning(warning)
    _log.info("starting", version=__version__, flags=config.given)
    tokenizer = load_tokenizer(config.tokenizer_path)
    template = load_chat_template(config.tokenizer_path, special_tokens=tokenizer.special_tokens)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_live(config, tokenizer, template))
    finally:
        if template is not None:
            template.close()
