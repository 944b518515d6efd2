"""The engine program: `python -m xllm_py.engine --fd N`, started by exec with its end of a socketpair inherited.

It reads Start from the pipe, opens executor and KV transport, answers Ready or Failed, and loops until the pipe ends. It
dies with its parent. SIGINT and SIGTERM are ignored: a terminal and systemd send them to the whole group, and the API process
decides what they mean.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xllm_py.base import failpoints, log
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import PeerUnavailable, StartError
from xllm_py.base.hashing import chain_root
from xllm_py.base.process import imports_for_good
from xllm_py.core.config import EngineConfig
from xllm_py.core.executor import Executor
from xllm_py.core.kv_memory import PARTS, KvLayout
from xllm_py.core.kv_plan import Ranks
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.engine.loop import EngineLoop
from xllm_py.engine.step_profile import write_profile
from xllm_py.transport.base import KvTransport
from xllm_py.transport.pipe import EnginePipe
from xllm_py.transport.ranked import RankedTransport
from xllm_py.wire.messages import Failed, Ready, Start

if TYPE_CHECKING:
    from xllm_py.engine.ranks import Others

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 30.0

_log = log.get(__name__)


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends; on other systems the end of the pipe has to do."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)  # it died before the kernel knew


def _read_start(pipe: EnginePipe) -> EngineConfig:
    readable, _, _ = select.select([pipe], [], [], _START_TIMEOUT_S)
    commands = pipe.receive() if readable else []
    if len(commands) != 1 or not isinstance(commands[0], Start):
        raise StartError("the engine was not told its configuration; it is started by xllm only")
    return commands[0].config


def _open_executor(pipe: EnginePipe, config: EngineConfig) -> Executor:
    """The rank side, and torch with it, is imported only when it is wanted."""
    if config.executor == "toy":
        from xllm_py.engine.toy import ToyExecutor

        return ToyExecutor(config)
    with imports_for_good():
        from xllm_py.engine.ranks import open_executor

    return open_executor(config, functools.partial(_end, pipe))


def _end(pipe: EnginePipe, error: StartError) -> None:
    """Another rank is gone, and this one waits for it somewhere in the middle of a sum: say so, and end at once."""
    from xllm_py.engine.rank_group import end_process

    with contextlib.suppress(PeerUnavailable):
        pipe.send(Failed(exit_code=error.exit_code, message=error.message))
    end_process(error)


def _follow(pipe: EnginePipe, config: EngineConfig) -> None:
    """Another rank than 0: it has no scheduler, and nothing to say but that it is there."""
    with imports_for_good():
        from xllm_py.engine.ranks import follow

    def ready() -> None:
        pipe.send(Ready(device=config.devices[config.ranks.place]))

    follow(config, functools.partial(_end, pipe), ready)


def _open_transport(config: EngineConfig, executor: Executor) -> RankedTransport | None:
    """Over the KV ports of all ranks."""
    if not config.kv_listen:
        return None
    from xllm_py.engine.kv_port import open_port

    memory, share, others = executor.kv_memory(), executor.kv_share(), _others(config, executor)
    return RankedTransport(
        open_port(config, memory, share),
        memory,
        others.kv_lines if others is not None else [],
        share=share,
        streams=range(config.kv_first_stream, config.kv_first_stream + config.kv_streams),
    )


def _others(config: EngineConfig, executor: Executor) -> Others | None:
    """The other ranks, where there are any."""
    if config.num_ranks == 1:
        return None
    from xllm_py.engine.ranks import ManyRanks

    return executor.others if isinstance(executor, ManyRanks) else None


def _ranks(config: EngineConfig, executor: Executor, transport: KvTransport | None) -> Ranks:
    """What peers have to know."""
    if transport is None:
        return Ranks()
    from xllm_py.engine.kv_port import announced

    others = _others(config, executor)
    lines = others.kv_lines if others is not None else []
    endpoints = (announced(config, transport), *(line.endpoint for line in lines))
    return Ranks(share=executor.kv_share(), endpoints=endpoints)


def _prefix_root(config: EngineConfig, model_fingerprint: str) -> bytes:
    if not config.cache.enable_prefix_cache:
        return b""
    return chain_root(
        key=config.cluster_key,
        model_fingerprint=model_fingerprint,
        seed=config.cache.prefix_seed,
    )


def _whole(executor: Executor) -> KvLayout:
    """What a token's KV looks like with the heads of all ranks."""
    return executor.kv_memory().layout.heads(executor.kv_share().num_heads)


def _ready(executor: Executor, endpoints: tuple[str, ...]) -> Ready:
    capacity, layout = executor.capacity(), _whole(executor)
    return Ready(
        num_blocks=capacity.num_blocks,
        block_size=capacity.block_size,
        vocab_size=capacity.facts.vocab_size,
        max_model_len=capacity.facts.max_model_len,
        eos_token_ids=capacity.facts.eos_token_ids,
        dtype=capacity.dtype,
        device=capacity.device,
        model_fingerprint=capacity.model_fingerprint,
        layout_fingerprint=layout.fingerprint,
        layout=layout.text,
        numerics_fingerprint=capacity.numerics_fingerprint,
        kv_endpoints=endpoints,
        kv_token_bytes=PARTS * layout.num_layers * layout.block_bytes // layout.block_size,
        summary=capacity.summary,
    )


def _poison(
    executor: Executor, transport: RankedTransport | None
) -> Callable[[Sequence[int]], None]:
    """Of every rank where they hand over, else of the one that plans."""
    return executor.kv_memory().poison if transport is None else transport.poison


def serve(pipe: EnginePipe, config: EngineConfig) -> None:
    """Open what the engine needs, tell the API process, and loop until the pipe ends."""
    failpoints.arm(config.failpoints, config.cluster_key)
    executor = _open_executor(pipe, config)
    transport = None
    try:
        if config.profile_to:
            write_profile(executor, config, RealClock())
        transport = _open_transport(config, executor)
        capacity = executor.capacity()
        scheduler = Scheduler(
            config.scheduler,
            capacity.facts,
            capacity.num_blocks,
            capacity.block_size,
            _prefix_root(config, capacity.model_fingerprint),
            _poison(executor, transport) if config.cache.poison else None,
        )
        clock, ranks = RealClock(), _ranks(config, executor, transport)
        agent = HandoffAgent(
            scheduler=scheduler,
            transport=transport,
            config=config.scheduler,
            model_fingerprint=capacity.model_fingerprint,
            layout=_whole(executor),
            send=pipe.send,
            ranks=ranks,
        )
        pipe.send(_ready(executor, ranks.endpoints))
        EngineLoop(
            scheduler=scheduler,
            executor=executor,
            agent=agent,
            pipe=pipe,
            clock=clock,
            overlaps=config.scheduler.overlap,
        ).run()
    finally:
        if transport is not None:
            transport.close()
        executor.close()


def main(argv: list[str]) -> int:
    """Exit code 0 when the parent closed the pipe, else that of the failure."""
    if len(argv) != 2 or argv[0] != "--fd" or not argv[1].isdigit():
        sys.stderr.write("the engine is started by xllm, not by hand\n")
        return 2
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = EnginePipe(socket.socket(fileno=int(argv[1])))
    try:
        config = _read_start(pipe)
        log.setup(level=config.log_level, form=config.log_format, program="xllm-engine")
        (serve if config.rank == 0 else _follow)(pipe, config)
    except StartError as error:
        pipe.send(Failed(exit_code=error.exit_code, message=error.message))
        return error.exit_code
    except PeerUnavailable as gone:
        _log.info("engine stops", reason=gone.message)
    finally:
        pipe.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
