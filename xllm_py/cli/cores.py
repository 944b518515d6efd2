"""--cpu_affinity: which cores an instance runs on, and that its threads are not more than they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from xllm_py.base.process import num_cores
from xllm_py.cli.rules import Causes

_LIST = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")


def cores(causes: Causes, values: Mapping[str, Any]) -> tuple[int, ...]:
    """The cores of --cpu_affinity, ascending; none: all this process may use."""
    text = values["cpu_affinity"]
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not text:
        _need_room(causes, values, num_cores(), "this process may use")
        return ()
    if not here:
        causes.need(False, "--cpu_affinity is not there on this system. Leave it out")
        return ()
    if not _LIST.fullmatch(text):
        causes.need(False, f"--cpu_affinity={text[:60]} is no list of cores. Write 0-3,6")
        return ()
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        wanted |= set(range(int(first), int(last or first) + 1))
    missing = sorted(wanted.difference(here))
    if missing or not wanted:
        known = ",".join(map(str, here))
        causes.need(False, f"--cpu_affinity={text[:60]}: this process may use the cores {known}")
        return ()
    _need_room(causes, values, len(wanted), "--cpu_affinity gives")
    return tuple(sorted(wanted))


def _need_room(causes: Causes, values: Mapping[str, Any], count: int, who: str) -> None:
    threads = values["cpu_threads"]
    if count and threads > count:
        causes.warn(
            f"--cpu_threads={threads} is more than the {count} cores that {who}: threads will wait for each other"
        )
