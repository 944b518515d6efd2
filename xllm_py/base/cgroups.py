"""What the control groups of this process leave it: cores and memory, as containers and systemd units are given them.

Both versions are read, the newer from one tree, the older from one tree for each controller; a group's ancestors count too. Where a
path is that of the host and its tree is not here, as in containers without a namespace of their own, the tree's root is the group.
Sources: Linux, Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60  # bytes; version 1 writes a number of that size where there is none


def cores(proc: Path = Path("/proc/self"), mounts: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the process may use at most; None: no limit."""
    found = []
    for group in _groups(proc, mounts, "cpu"):
        quota, period = [*_words(group / "cpu.max"), "", ""][:2]
        if not quota:
            quota = "".join(_words(group / "cpu.cfs_quota_us"))
            period = "".join(_words(group / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory(
    proc: Path = Path("/proc/self"), mounts: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int] | None:
    """(available, total) bytes, each of the group that leaves least; None: no limit.

    Files in a group's cache that nobody has used for long count as available.
    """
    available, total = [], []
    for group in _groups(proc, mounts, "memory"):
        limit = "".join(_words(group / "memory.max") or _words(group / "memory.limit_in_bytes"))
        used = "".join(_words(group / "memory.current") or _words(group / "memory.usage_in_bytes"))
        if limit.isdigit() and int(limit) < _NO_LIMIT and used.isdigit():
            held = max(0, int(used) - _idle_files(group))
            available.append(max(0, int(limit) - held))
            total.append(int(limit))
    return (min(available), min(total)) if total else None


def _groups(proc: Path, mounts: Path, controller: str) -> Iterator[Path]:
    """The process's group for a controller and its ancestors, as far as they are here."""
    for line in _lines(proc / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        names = (controllers, controller) if controllers else ("", "unified")
        for root in (mounts / name for name in names):
            parts = Path(path).parts[1:]
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth])


def _idle_files(group: Path) -> int:
    wanted = {
        "total_inactive_file",
        "inactive_file",
    }  # of version 1 and 2; the first of version 1 counts children too
    sizes = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat") if " " in line)
    found = [sizes[name] for name in sorted(wanted, reverse=True) if name in sizes]
    return int(found[0]) if found and found[0].isdigit() else 0


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


def _lines(file: Path) -> list[str]:
    """None where the file is not there or may not be read: then it sets no limit."""
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
