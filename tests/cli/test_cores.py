"""--cpu_affinity: lists of cores, what is wrong with them, and that an instance runs where it was told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_py.cli.cores import cores
from xllm_py.cli.rules import Causes


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with the cores 0 to 5 and 8."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 8})


def judged(text: str, threads: int = 0) -> tuple[tuple[int, ...], Causes]:
    causes = Causes()
    return cores(causes, {"cpu_affinity": text, "cpu_threads": threads}), causes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("3", (3,)), ("0-2,8", (0, 1, 2, 8)), ("5,1-2,1", (1, 2, 5)), ("8-8", (8,))],
)
def test_a_list_names_its_cores(text: str, expected: tuple[int, ...]) -> None:
    found, causes = judged(text)
    assert (found, causes.lines, causes.warnings) == (expected, [], [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all", "is no list of cores. Write 0-3,6"),
        ("1,", "is no list"),
        ("1--2", "is no list"),
        ("-1", "is no list"),
        ("6", "may use the cores 0,1,2,3,4,5,8"),
        ("4-9", "may use the cores"),
        ("3-1", "may use the cores"),
    ],
)
def test_a_list_that_is_none_is_refused_with_what_would_be(text: str, words: str) -> None:
    found, causes = judged(text)
    assert found == ()
    assert len(causes.lines) == 1
    assert words in causes.lines[0]


@pytest.mark.parametrize(
    ("text", "threads", "warned"),
    [("0-1", 2, False), ("0-1", 3, True), ("", 7, False), ("", 8, True)],
)
def test_more_threads_than_cores_is_said(text: str, threads: int, warned: bool) -> None:
    _, causes = judged(text, threads)
    assert not causes.lines
    assert bool(causes.warnings) == warned


def test_an_instance_runs_on_its_cores(tmp_path: Path) -> None:
    core = min(int(word) for word in _allowed("self"))
    code = (
        "import sys; from xllm_py.base.process import pin; "
        f"pin([{core}]); import os; print(sorted(os.sched_getaffinity(0)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"[{core}]"


def _allowed(pid: str) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    text = next(line for line in lines if line.startswith("Cpus_allowed_list")).split()[1]
    return [part.split("-")[0] for part in text.split(",")]
