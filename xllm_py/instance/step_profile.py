"""`xllm --profile_steps=FILE`: an engine is started, measures its steps, writes the file, and that is all.

Called by cli/xllm in place of instance/daemon.run. Nothing is bound, nothing is registered.
"""

from __future__ import annotations

import asyncio
from typing import Any

from xllm_py.base import log
from xllm_py.base.clock import RealClock
from xllm_py.base.tasks import TaskFamily
from xllm_py.instance.config import InstanceConfig
from xllm_py.instance.engine_link import EngineHandlers, EngineLink

_TIMEOUT_S = 1800.0


def run(config: InstanceConfig) -> int:
    """The exit code. Raises StartError leaves."""
    log.setup(level=config.log.level, form=config.log.form, program="xllm")
    asyncio.run(_profile(config))
    return 0


async def _profile(config: InstanceConfig) -> None:
    tasks = TaskFamily("profile")
    engine = EngineLink(handlers=EngineHandlers.of_none(_nothing), tasks=tasks, clock=RealClock())
    try:
        await engine.start(config.engine, timeout_s=_TIMEOUT_S)
    finally:
        await engine.close()
        await tasks.close()


def _nothing(_: Any) -> None:
    """An engine that only measures says no more than that it lives."""
