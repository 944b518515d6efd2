"""`xllm` with --node_rank above 0: the ranks of one more node of an instance. It has no door, no card and no scheduler; node 0 has.

It starts its ranks' engine and ends with it: when node 0 ends, or any rank of the instance, its engine ends with exit code 7. A signal ends it, and with
that the whole instance, whose requests then go on elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from typing import Any

import uvloop

from xllm_py import __version__
from xllm_py.base import log
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import EngineDied
from xllm_py.base.notify import notify
from xllm_py.base.tasks import TaskFamily
from xllm_py.instance.config import InstanceConfig
from xllm_py.instance.engine_link import EngineHandlers, EngineLink

_log = log.get(__name__)


def _unasked(said: Any) -> None:
    """A rank that plans nothing has nothing to tell."""
    _log.warning("unexpected word from a rank", kind=type(said).__name__)


async def _live(config: InstanceConfig) -> int:
    """Until a signal, or until the engine ends; the exit code. Raises StartError leaves."""
    tasks, stop = TaskFamily("rank node"), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = EngineLink(handlers=EngineHandlers.of_none(_unasked), tasks=tasks, clock=RealClock())
    told = dataclasses.replace(config.engine, cluster_key=config.cluster.cluster_key)
    stopped = tasks.start(stop.wait(), name="stop")
    starting = tasks.start(
        engine.start(told, timeout_s=config.engine_start_timeout_s), name="engine"
    )
    try:
        await asyncio.wait((stopped, starting), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return 0
        starting.result()
        ranks = config.engine.ranks
        notify("READY=1")
        _log.info("ready", node=ranks.node_rank, nnodes=ranks.nnodes, devices=config.engine.devices)
        failed = tasks.start(tasks.wait_failed(), name="failure")
        await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return 0
        error = failed.result()
        _log.error("the node stops because its engine ended", reason=str(error))
        return error.exit_code if isinstance(error, EngineDied) else 1
    finally:
        await engine.close()
        await tasks.close()


def run(config: InstanceConfig) -> int:
    """Compute until told to stop; the exit code. Raises StartError leaves."""
    log.setup(
        level="debug" if config.log.verbose else config.log.level,
        form=config.log.form,
        directory=config.log.directory,
        program="xllm",
    )
    for warning in config.warnings:
        _log.warning(warning)
    _log.info("starting", version=__version__, flags=config.given)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(config))
