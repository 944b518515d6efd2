"""The command lines of the README and of the reference page, run as a user runs them.

They use fixed ports, so they stand in one file: test.sh gives a file to one worker.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = [sys.executable, str(ROOT / "scripts" / "quickstart.py")]
pytestmark = pytest.mark.slow


NPUS = {"XLLM_SIMULATE_NPU": "2", "P_DEVICE": "npu:0", "D_DEVICE": "npu:1"}


@pytest.mark.parametrize(
    "given",
    [{}, {"PASTED": "1"}, NPUS],
    ids=["verbatim", "stray blanks included", "the page's devices, simulated"],
)
def test_the_reference_page_works_as_it_stands(given: dict[str, str]) -> None:
    done = subprocess.run(
        [str(ROOT / "tests" / "smoke" / "reference_page.sh")],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference page: ok" in done.stdout


def test_the_quickstart_answers_in_english_and_says_where_the_time_went() -> None:
    done = subprocess.run(
        [*QUICKSTART, "Who are you?"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "I am the demo model of xllm_py" in done.stdout
    for moment in ("queue", "prefill", "first token", "handoff", "decode"):
        assert re.search(rf"^  {moment} +\d+\.\d ms", done.stdout, re.MULTILINE), done.stdout
    assert "curl -N http://" in done.stdout
    assert "from openai import OpenAI" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_kept_quickstart_stops_every_process_it_started(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*QUICKSTART, "--keep"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        read_until(process, b"Ctrl-C stops them")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 6  # registry, master, two instances, two engines
        process.send_signal(number)
        assert process.wait(60) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def read_until(process: subprocess.Popen[bytes], wanted: bytes, timeout_s: float = 100.0) -> None:
    """Read the output up to a word; an ended process or a passed deadline is an error with what was read."""
    assert process.stdout is not None
    seen, deadline = b"", time.monotonic() + timeout_s
    while wanted not in seen:
        ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        piece = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not piece:
            raise AssertionError(f"waited for {wanted!r}, read {seen.decode(errors='replace')}")
        seen += piece


def test_a_quickstart_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    done = subprocess.run(
        [*QUICKSTART, f"--model={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("quickstart: error: ")
    assert "ended with exit code 3" in done.stderr
