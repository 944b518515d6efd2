"""What a process of ours and its host hold, asked of the operating system. With base/ports the home of psutil.

The ledgers of both daemons, the memory question of device/cpu and the ranks' choice of a network stand on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from xllm_py.base import cgroups

_YOUNG = 20_000  # objects more than before, until the collector of cycles looks at them


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
    """(available, total) bytes of memory: this host's, or less where a control group of the process is given less."""
    seen = psutil.virtual_memory()
    available, total = cgroups.memory() or (seen.available, seen.total)
    return min(available, seen.available), min(total, seen.total)


def interface_towards(host: str, port: int) -> str:
    """Name of the network interface over which this host is reached; empty when there is no way there. Nothing is sent."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(
            each.family == family and each.address.partition("%")[0] == own for each in addresses
        ):
            return name
    return ""


def give_back_memory() -> None:
    """Return to the system what was freed and the C library keeps for later; nothing where it is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def imports_for_good() -> Iterator[None]:
    """Around imports: what they make stays to the end, so the collector of cycles is not to look through it, neither meanwhile nor ever.

    Of torch's import that is a fifth, and of a running engine every pass of a tenth of a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def stay() -> None:
    """What a server has made by now stays to its end: the collector of cycles does not look through it, and looks less often at what comes.

    Requests leave hardly a cycle behind, and a pass over the young ones for every 700 objects was a twentieth of what a request costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG)


def num_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where a control group gives it the time of fewer.

    Threads beyond that would be stopped together in every period, and the others wait for them.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = cgroups.cores()
    return max(1, min(allowed or 1, int(given) if given is not None else sys.maxsize))
