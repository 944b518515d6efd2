"""How flags are declared, turned into click options, shown in help, and warned about. Each flag is declared once, in a table.

Priorities are those of SPEC section 2: A is shown by --help, B by --helpfull, C is accepted and ignored (enable_failpoints is not). A flag marked idle parses
but does nothing yet, and says so when it is given.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xllm_py.base import log
from xllm_py.base.errors import StartError, UsageError
from xllm_py.cli import flag_types, gflags

TYPES: dict[str, click.ParamType[Any]] = {
    "bool": flag_types.BOOL,
    "int32": flag_types.INT32,
    "uint32": flag_types.UINT32,
    "int64": flag_types.INT64,
    "double": flag_types.DOUBLE,
    "string": flag_types.STRING,
}
SECRET = frozenset({"key", "password", "token"})
_HELP_FOR_PEOPLE = ("help", "h", "helpshort")
_NEVER = object()


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. What an idle one says anyway is `does`: giving that value asks for nothing that is missing."""

    name: str
    type: str
    default: Any
    priority: str
    text: str
    idle: bool = False
    group: str = ""
    does: Any = _NEVER


def one_line(text: str) -> str:
    """The text with what is not printable spelt out, so that a value given by hand cannot break a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def in_group(group: str, *flags: Flag) -> list[Flag]:
    """The same flags with their group's name."""
    return [dataclasses.replace(flag, group=group) for flag in flags]


def a(name: str, kind: str, default: Any, text: str, **more: Any) -> Flag:
    """A flag of priority A."""
    return _flag(name, kind, default, "A", text, **more)


def b(name: str, kind: str, default: Any, text: str, **more: Any) -> Flag:
    """A flag of priority B."""
    return _flag(name, kind, default, "B", text, **more)


def _flag(
    name: str, kind: str, default: Any, priority: str, text: str, *, idle: bool = False, **more: Any
) -> Flag:
    if kind == "bool":
        more = {"does": False, **more}
    return Flag(name, kind, default, priority, text, idle, **more)


def ignored(names: str, kind: str) -> list[Flag]:
    """Flags of the original that are accepted and ignored."""
    default = {"bool": False, "string": ""}[kind]
    return [
        Flag(name, kind, default, "C", "accepted, ignored", True, "ignored")
        for name in names.split()
    ]


@dataclass(frozen=True, slots=True)
class Given:
    """The values of all flags, and which were given by hand."""

    values: dict[str, Any]
    by_hand: frozenset[str]
    warnings: tuple[str, ...]


class FlagCommand(gflags.GflagsCommand):
    """A daemon's command: its flag table, its help in groups, its warnings."""

    def __init__(
        self,
        program: str,
        intro: str,
        table: Sequence[Flag],
        run: Callable[[Given], int],
        *,
        ignored_prefixes: tuple[str, ...] = (),
        aliases: tuple[str, ...] = (),
    ) -> None:
        self._program = program
        self._intro = intro
        self._table = table
        self._run = run
        self.ignored_prefixes = ignored_prefixes
        self.aliases = aliases
        self.unsuggested = frozenset(flag.name for flag in table if flag.priority == "C")
        options: list[click.Parameter] = [
            click.Option(
                [f"--{flag.name}"], type=TYPES[flag.type], default=flag.default, help=flag.text
            )
            for flag in table
        ]
        super().__init__(program, params=options, callback=self._called, add_help_option=False)

    def _called(self, **values: Any) -> int:
        context = click.get_current_context()
        word = context.meta.get("gflags.help", "")
        if word:
            _print(self.version() if word == "version" else self.help_for(word))
            return 0
        by_hand = {
            name
            for name in values
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        passed_over = [*context.meta["gflags.passed_over"]]
        if values["config_json_file"]:
            self._read_config_file(context, values, by_hand, passed_over)
        warnings = [
            *context.meta["gflags.warnings"],
            *self._idle_warnings(values, by_hand, passed_over),
        ]
        try:
            return self._run(
                Given(values, frozenset(by_hand), tuple(one_line(line) for line in warnings))
            )
        except StartError:
            if values["verbose"]:
                traceback.print_exc()
            raise

    def _read_config_file(
        self,
        context: click.Context,
        values: dict[str, Any],
        by_hand: set[str],
        passed_over: list[str],
    ) -> None:
        """--config_json_file: an object flag -> value, weaker than any flag given."""
        path = values["config_json_file"]
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"--config_json_file={path} cannot be read ({error}). Check it"
            ) from error
        if not isinstance(body, dict):
            raise UsageError(
                f"--config_json_file={path} is no JSON object. Write flag: value pairs"
            )
        params = {str(param.name): param for param in self.params}
        causes, given = [], frozenset(by_hand)
        for key, value in body.items():
            name, param = key.replace("-", "_"), params.get(key.replace("-", "_"))
            word = str(value).lower() if isinstance(value, bool) else str(value)
            if param is None and self.is_passed_over(name):
                passed_over.append(name)
            elif param is None:
                causes.append(f"{path}: unknown flag {one_line(key)}. See --helpfull")
            elif not isinstance(value, bool | int | float | str):
                causes.append(f"{path}: {name} is no bool, number or string. Write one")
            elif name not in given:
                try:
                    values[name] = param.type.convert(word, param, context)
                    by_hand.add(name)
                except click.BadParameter as error:
                    causes.append(f"{path}: {name}: {one_line(error.message)}. See --helpfull")
        if causes:
            raise UsageError("\n".join(causes))

    def _idle_warnings(
        self, values: dict[str, Any], by_hand: set[str], passed_over: list[str]
    ) -> list[str]:
        given = [flag for flag in self._table if flag.idle and flag.name in by_hand]
        later = [
            f"--{flag.name}"
            for flag in given
            if flag.priority != "C" and values[flag.name] != flag.does
        ]
        never = [f"--{flag.name}" for flag in given if flag.priority == "C"]
        never += [f"--{name}" for name in dict.fromkeys(passed_over)]
        lines = []
        if later:
            lines.append(f"accepted but without effect in this version: {', '.join(later)}")
        if never:
            lines.append(f"flags of the original, ignored here: {', '.join(never)}")
        return lines

    def version(self) -> str:
        """One line; looks torch up without importing it."""
        try:
            torch = metadata.version("torch")
        except metadata.PackageNotFoundError:
            torch = "not installed"
        ours = metadata.version("xllm_py") if _installed() else _source_version()
        python = ".".join(str(part) for part in sys.version_info[:3])
        return (
            f"{self._program} version {ours} (python {python}, torch {torch}, devices cpu cuda npu)"
        )

    def help_for(self, word: str) -> str:
        """The text of one of the help flags."""
        name, _, wanted = word.partition("=")
        rows, tail, full = list(self._table), "", name not in _HELP_FOR_PEOPLE
        if not full:
            rows = [flag for flag in rows if flag.priority == "A"]
            tail = "\n--helpfull shows all flags, --flagfile=FILE reads them from a file."
        if name == "helpmatch":
            rows = [flag for flag in rows if wanted.replace("-", "_") in flag.name]
        if name == "helpon":
            rows = [flag for flag in rows if wanted.lower() in flag.group.lower()]
        if not rows:
            groups = "; ".join(dict.fromkeys(flag.group for flag in self._table))
            tail = f"\nNo flag matches '{one_line(wanted)}'. Groups: {groups}"
        lines = [self._intro]
        for group in dict.fromkeys(flag.group for flag in rows):
            lines.append(f"\n{group}:")
            lines += [_row(flag, full) for flag in rows if flag.group == group]
        return "\n".join(lines) + tail

    def complain(self, causes: Sequence[str]) -> None:
        """`xllm: error: <cause>. <fix>.`, one line each, and nothing after them."""
        log.close()
        for cause in causes:
            end = "" if cause.endswith((".", "?")) else "."
            click.echo(f"{self._program}: error: {one_line(cause)}{end}", err=True)

    def start(self, words: Sequence[str]) -> int:
        """Parse and run; returns the exit code."""
        try:
            with self.make_context(self._program, list(words)) as context:
                code: int = self.invoke(context)
                return code
        except gflags.CommandLineError as error:
            self.complain(error.causes)
            return error.exit_code
        except click.UsageError as error:
            self.complain([error.format_message()])
            return error.exit_code
        except StartError as error:
            self.complain(error.message.split("\n"))
            return error.exit_code


def _print(text: str) -> None:
    """A reader that closed early, as `head` does, has read enough."""
    try:
        click.echo(text)
    except BrokenPipeError:
        # nothing more is written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _row(flag: Flag, full: bool) -> str:
    default = str(flag.default).lower() if flag.type == "bool" else str(flag.default)
    text = flag.text
    if flag.idle and flag.priority != "C":
        text += " (no effect yet)"
    if not full:
        return f"  --{flag.name}={default}\n      {text}"
    shown = f"{flag.type}, default {default or 'empty'}"
    return f"  --{flag.name} ({shown}) [{flag.priority}]\n      {text}"


def _installed() -> bool:
    try:
        metadata.version("xllm_py")
    except metadata.PackageNotFoundError:
        return False
    return True


def _source_version() -> str:
    import xllm_py

    return xllm_py.__version__


def echo_given(given: Given) -> str:
    """One line with all flags that were given, secrets masked."""
    shown = []
    for name in sorted(given.by_hand):
        value = given.values[name]
        parts = name.split("_")
        hidden = bool(SECRET.intersection(parts)) and parts[-1] not in ("file", "path")
        shown.append(f"--{name}={'***' if hidden and isinstance(value, str) else value}")
    return one_line(" ".join(shown)) or "all flags at their defaults"
