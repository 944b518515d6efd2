"""Real gflags and our parser side by side: the same flags, the same command lines.

`python -m tests.cli.oracle` fills the `real` column of gflags_table.json anew from the libgflags installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xllm_py.cli import gflags
from xllm_py.cli.flags import TYPES

HERE = Path(__file__).parent
TABLE = HERE / "gflags_table.json"
SOURCE = HERE / "gflags_oracle.cc"
PROGRAM = "gflags_oracle"  # the name flagfiles know both programs by
FLAGS = {
    "flag_off": ("bool", False),
    "flag_on": ("bool", True),
    "small": ("int32", 1),
    "count": ("uint32", 2),
    "large": ("int64", 3),
    "ratio": ("double", 0.5),
    "text": ("string", ""),
    "other_text": ("string", ""),
}
# the values that were set, None when the line is refused
Outcome = dict[str, Any] | None


@dataclass(frozen=True)
class Row:
    """One command line, run in a folder with these files and in this environment."""

    words: tuple[str, ...]
    real: Any  # what gflags says: {"values", "words"}, None when it refuses
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    reason: str = ""  # where we differ: why

    @property
    def name(self) -> str:
        return " ".join(word or "''" for word in self.words) or "(nothing)"

    def as_json(self) -> dict[str, Any]:
        more = {"files": self.files, "env": self.env, "reason": self.reason}
        given = {name: value for name, value in more.items() if value}
        return {"words": list(self.words), **given, "real": self.real}


def rows() -> list[Row]:
    """The frozen table."""
    raw = json.loads(TABLE.read_text(encoding="utf-8"))
    return [Row(**{**body, "words": tuple(body["words"])}) for body in raw]


def buildable() -> bool:
    """Whether the compiler and the header of gflags are here."""
    return Path("/usr/include/gflags/gflags.h").is_file() and shutil.which("g++") is not None


def build(folder: Path) -> Path:
    """Compile the oracle."""
    program = folder / PROGRAM
    command = ["g++", "-o", str(program), str(SOURCE), "-lgflags"]
    subprocess.run(command, check=True, timeout=120)
    return program


def ask(program: Path, row: Row) -> Any:
    """What real gflags makes of it."""
    with staged(row) as folder:
        ended = subprocess.run(
            [PROGRAM, *row.words],
            executable=program,
            cwd=folder,
            env={**os.environ, **row.env},
            capture_output=True,
            text=True,
            timeout=20,
        )
    if ended.returncode:
        assert "ERROR" in ended.stderr or "No such file" in ended.stderr, ended.stderr
        return None
    return json.loads(ended.stdout)


@contextmanager
def staged(row: Row) -> Iterator[Path]:
    """A folder with the row's files, as the current one, and its environment."""
    before, here = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        for file, text in row.files.items():
            (Path(name) / file).write_bytes(text.encode())
        os.chdir(name)
        os.environ.update(row.env)
        try:
            yield Path(name)
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


@dataclass
class Ours:
    """What our parser makes of a command line."""

    values: Outcome
    causes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def ours(row: Row) -> Ours:
    """Parse with a command that has the oracle's flags."""
    seen: dict[str, Any] = {}
    options: list[click.Parameter] = [
        click.Option([f"--{name}"], type=TYPES[kind], default=default)
        for name, (kind, default) in FLAGS.items()
    ]
    command = gflags.GflagsCommand(
        PROGRAM,
        params=options,
        callback=lambda **values: seen.update(values),
        add_help_option=False,
    )
    with staged(row):
        try:
            with command.make_context(PROGRAM, list(row.words)) as context:
                command.invoke(context)
        except gflags.CommandLineError as error:
            assert error.exit_code == 2
            return Ours(None, causes=error.causes)
    source = context.get_parameter_source
    given = {name: seen[name] for name in FLAGS if source(name) is ParameterSource.COMMANDLINE}
    return Ours(given, warnings=list(context.meta.get("gflags.warnings", ())))


def freeze() -> None:
    """Write the table anew, each row on a line of its own."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        fresh = [
            Row(row.words, ask(program, row), row.files, row.env, row.reason) for row in rows()
        ]
    lines = ",\n".join(json.dumps(row.as_json(), ensure_ascii=True) for row in fresh)
    TABLE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    freeze()
