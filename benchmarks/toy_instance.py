"""An instance whose steps take a fixed time and no core, so that many of them run on one machine as if each had its own.

    python -m benchmarks.toy_instance STEP_S <flags of xllm>

Everything but the model is real: scheduler, handoff, KV over TCP, control, master.
"""

from __future__ import annotations

import dataclasses
import sys

from xllm_py.cli import xllm_flags
from xllm_py.cli.entry import run_command
from xllm_py.cli.flags import FlagCommand, Given
from xllm_py.cli.xllm import INTRO, build

_BLOCKS = 4096


def run_toy(given: Given) -> int:
    """Serve, or write a profile."""
    config = build(given)
    toy = dataclasses.replace(
        config.engine, executor="toy", toy_step_s=STEP_S, toy_num_blocks=_BLOCKS
    )
    config = dataclasses.replace(config, engine=toy)
    if toy.profile_to:
        from xllm_py.instance.step_profile import run as profile

        return profile(config)
    from xllm_py.instance.daemon import run

    return run(config)


if __name__ == "__main__":
    STEP_S = float(sys.argv[1])
    prefixes = xllm_flags.IGNORED_PREFIXES
    run_command(
        FlagCommand("toy", INTRO, xllm_flags.TABLE, run_toy, ignored_prefixes=prefixes),
        sys.argv[2:],
    )
