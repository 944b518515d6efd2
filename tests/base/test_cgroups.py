"""Limits of control groups, in trees as containers, systemd units and hosts show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_py.base import cgroups, process

MIB = 1 << 20


class Host:
    """Files under a folder that stand for /proc/self and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.mounts = folder / "proc", folder / "cgroup"
        self.proc.mkdir()

    def put(self, file: str, text: str) -> None:
        path = self.mounts / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def belongs_to(self, *lines: str) -> None:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def cores(self) -> float | None:
        return cgroups.cores(self.proc, self.mounts)

    def memory(self) -> tuple[int, int] | None:
        return cgroups.memory(self.proc, self.mounts)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_control_groups_there_is_no_limit(host: Host) -> None:
    assert host.cores() is None
    assert host.memory() is None
    host.belongs_to("0::/", "", "nonsense", "7:cpu")
    assert host.cores() is None
    assert host.memory() is None


def test_a_systemd_unit_has_the_quota_of_its_group(host: Host) -> None:
    host.belongs_to("0::/system.slice/xllm.service")
    host.put("system.slice/xllm.service/cpu.max", "150000 100000\n")
    host.put("system.slice/xllm.service/memory.max", f"{800 * MIB}\n")
    host.put("system.slice/xllm.service/memory.current", f"{300 * MIB}\n")
    host.put("system.slice/xllm.service/memory.stat", f"anon 5\ninactive_file {100 * MIB}\n")
    assert host.cores() == 1.5
    assert host.memory() == (600 * MIB, 800 * MIB)


def test_the_tightest_of_a_group_and_its_ancestors_counts(host: Host) -> None:
    host.belongs_to("0::/a/b")
    host.put("a/b/cpu.max", "max 100000\n")
    host.put("a/cpu.max", "300000 100000\n")
    host.put("a/b/memory.max", "max\n")
    host.put("a/b/memory.current", "7\n")
    host.put("a/memory.max", f"{4 * MIB}\n")
    host.put("a/memory.current", f"{MIB}\n")
    assert host.cores() == 3.0
    assert host.memory() == (3 * MIB, 4 * MIB)


def test_a_container_reads_its_own_root_where_the_path_is_the_hosts(host: Host) -> None:
    host.belongs_to("0::/kubepods/pod1/abc")
    host.put("cpu.max", "200000 100000\n")
    assert host.cores() == 2.0


def test_version_1_has_a_tree_for_each_controller(host: Host) -> None:
    host.belongs_to("5:memory:/docker/x", "4:cpu,cpuacct:/docker/x", "1:cpuset:/", "0::/")
    host.put("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "400000\n")
    host.put("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n")
    host.put("cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    host.put("cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    host.put("memory/docker/x/memory.limit_in_bytes", f"{100 * MIB}\n")
    host.put("memory/docker/x/memory.usage_in_bytes", f"{60 * MIB}\n")
    host.put("memory/docker/x/memory.stat", f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n")
    host.put("memory/memory.limit_in_bytes", "9223372036854771712\n")
    host.put("memory/memory.usage_in_bytes", f"{999 * MIB}\n")
    assert host.cores() == 4.0
    assert host.memory() == (50 * MIB, 100 * MIB)


def test_a_full_ancestor_leaves_little_and_the_limit_stays_the_groups_own(host: Host) -> None:
    host.belongs_to("0::/a/b")
    host.put("a/memory.max", "1000\n")
    host.put("a/memory.current", "990\n")
    host.put("a/b/memory.max", "50\n")
    host.put("a/b/memory.current", "10\n")
    assert host.memory() == (10, 50)


def test_a_group_that_holds_more_than_it_may_has_nothing_left(host: Host) -> None:
    host.belongs_to("0::/")
    host.put("memory.max", "100\n")
    host.put("memory.current", "150\n")
    assert host.memory() == (0, 100)


@pytest.mark.parametrize(("given", "expected"), [(0.5, 1), (1.9, 1), (1e9, None), (None, None)])
def test_an_instance_opens_no_more_threads_than_it_is_given_cores(
    monkeypatch: pytest.MonkeyPatch, given: float | None, expected: int | None
) -> None:
    allowed = process.num_cores() if expected is None else expected
    monkeypatch.setattr(cgroups, "cores", lambda: given)
    assert process.num_cores() == allowed


def test_memory_is_the_groups_where_the_host_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory", lambda: (MIB, 2 * MIB))
    assert process.host_memory() == (MIB, 2 * MIB)
    monkeypatch.setattr(cgroups, "memory", lambda: (1 << 59, 1 << 59))
    _, total = process.host_memory()
    assert total < 1 << 59
