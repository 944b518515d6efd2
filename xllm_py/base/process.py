"""What a process of ours and its host hold, asked of the operating system. With base/ports the home of psutil.

The ledgers of both daemons and the memory question of device/cpu stand on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Counts of one process at one moment."""

    file_handles: int
    threads: int
    resident_bytes: int


def held(pid: int | None = None) -> Held:
    """What the process with this id holds; our own without one. Raises ProcessLookupError when it is gone."""
    try:
        process = psutil.Process(pid)
        return Held(
            file_handles=process.num_fds(),
            threads=process.num_threads(),
            resident_bytes=process.memory_info().rss,
        )
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"process {error.pid} is gone") from error


def pin(cores: Sequence[int]) -> None:
    """Run on these cores only, with all threads and processes that are started from now on."""
    os.sched_setaffinity(0, cores)


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of this host's memory."""
    seen = psutil.virtual_memory()
    return seen.available, seen.total


def num_cores() -> int:
    """Cores that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1
