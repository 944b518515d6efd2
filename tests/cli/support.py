"""What the tests of the two commands share: a command that stops before its daemon, and what it said."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_py.cli import master_flags, xllm, xllm_flags, xllm_master
from xllm_py.cli.flags import FlagCommand, Given

ROOT = Path(__file__).resolve().parents[2]
TABLES = {"xllm": xllm_flags.TABLE, "xllm-master": master_flags.TABLE}
BUILDS: dict[str, Callable[[Given], Any]] = {"xllm": xllm.build, "xllm-master": xllm_master.build}


@dataclass
class Said:
    """How a command ended: its code, what it printed, and the configuration its daemon would have got."""

    code: int
    out: str
    err: str
    config: Any = None
    given: Given | None = None

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


def say(program: str, *words: str) -> Said:
    """Parse and build in this process; nothing is started."""
    said = Said(-1, "", "")

    def build(given: Given) -> int:
        said.given = given
        said.config = BUILDS[program](given)
        return 0

    real = {"xllm": xllm.COMMAND, "xllm-master": xllm_master.COMMAND}[program]
    command = FlagCommand(
        program,
        f"{program}: for a test",
        TABLES[program],
        build,
        ignored_prefixes=real.ignored_prefixes,
        aliases=real.aliases,
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        said.code = command.start(words)
    said.out, said.err = out.getvalue(), err.getvalue()
    return said


def child(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a fresh interpreter."""
    return child(sys.executable, "-c", code, *words)


def write_model(folder: Path, **config: Any) -> Path:
    """A folder that counts as a model as long as nobody loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
