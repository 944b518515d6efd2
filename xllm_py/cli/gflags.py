"""gflags 2.2.2 syntax on top of click: a command mix-in that rewrites the command line before click parses it.

It knows names, values, `--noflag`, dashes for underscores, --flagfile, --fromenv, --tryfromenv, --undefok and the help variants, and
hands clean `--name=value` words to click, whose types, defaults and errors stay in charge. Differences from gflags are those
of SPEC 1.2: exit codes, a stray positional is an error, blanks-only words are passed over with a warning. All errors of one
command line are reported at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

TRUE = frozenset({"1", "t", "true", "y", "yes"})
FALSE = frozenset({"0", "f", "false", "n", "no"})
_MOST_NESTING = 16
_SPECIAL = ("flagfile", "fromenv", "tryfromenv", "undefok")
_INTEGER = re.compile(r"[ \t\n\v\f\r]*[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)")


class BoolType(click.ParamType[Any]):
    """true and false in gflags' words."""

    name = "bool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """Raise click's BadParameter for other words."""
        if isinstance(value, bool):
            return value
        word = str(value).lower()
        if word not in TRUE and word not in FALSE:
            self.fail(f"'{value}' is no bool; write true or false", param, ctx)
        return word in TRUE


class IntType(click.ParamType[Any]):
    """A decimal or hexadecimal integer within the range of its C type."""

    def __init__(self, name: str, low: int, high: int) -> None:
        self.name = name
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Trailing characters, an empty word, overflow and a sign on an unsigned type are errors."""
        if isinstance(value, int):
            return value
        word = str(value)
        if not _INTEGER.fullmatch(word) or (self._low == 0 and "-" in word):
            self.fail(f"'{value}' is no {self.name}", param, ctx)
        digits = word.strip()
        number = int(digits, 16 if "x" in digits.lower() else 10)
        if not self._low <= number <= self._high:
            self.fail(f"{value} does not fit into {self.name}", param, ctx)
        return number


class DoubleType(click.ParamType[Any]):
    """A finite floating-point number."""

    name = "double"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Underscores, trailing characters and infinities are errors."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"'{value}' is no double", param, ctx)
        if "_" in str(value) or str(value) != str(value).rstrip():
            self.fail(f"'{value}' is no double", param, ctx)
        if number != number or number in (float("inf"), float("-inf")):
            self.fail(f"{value} is not finite", param, ctx)
        return number


BOOL = BoolType()
INT32 = IntType("int32", -(2**31), 2**31 - 1)
UINT32 = IntType("uint32", 0, 2**32 - 1)
INT64 = IntType("int64", -(2**63), 2**63 - 1)
DOUBLE = DoubleType()
STRING = click.STRING


class CommandLineError(click.UsageError):
    """All causes of one command line, one line each; exit code 2."""

    def __init__(self, causes: Sequence[str]) -> None:
        super().__init__("\n".join(causes))
        self.causes = list(causes)


@dataclass(slots=True)
class Parsed:
    """What a command line came to."""

    values: list[tuple[str, str]] = field(default_factory=list)  # in order; the last one wins
    positionals: list[str] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)  # name, where it stood
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tolerated: set[str] = field(default_factory=set)
    help_word: str = ""


class Expander:
    """Turns words into (name, value) pairs along gflags' rules. `bools` are the names of bool flags, `names` of all flags."""

    def __init__(self, names: Sequence[str], bools: Sequence[str], program: str) -> None:
        self._names = frozenset(names)
        self._bools = frozenset(bools)
        self._program = program
        self.parsed = Parsed()

    def expand(self, words: Sequence[str]) -> Parsed:
        """The whole command line."""
        rest = iter(words)
        for word in rest:
            if word == "--":
                self.parsed.positionals += list(rest)
                break
            self._word(word, rest)
        parsed = self.parsed
        parsed.unknown = [
            (name, where) for name, where in parsed.unknown if not self._is_tolerated(name)
        ]
        return parsed

    def _is_tolerated(self, name: str) -> bool:
        return name in self.parsed.tolerated or name.removeprefix("no") in self.parsed.tolerated

    def _word(self, word: str, rest: Iterator[str]) -> None:
        if not word.strip():
            self.parsed.warnings.append(
                "a word of blanks only was passed over; is there a blank behind a backslash at the end of a line?"
            )
            return
        if not word.startswith("-") or word == "-":
            self.parsed.positionals.append(word)
            return
        body = word[2:] if word.startswith("--") else word[1:]
        name, equals, value = body.partition("=")
        self._flag(name.replace("-", "_"), value if equals else None, rest)

    def _flag(self, name: str, value: str | None, rest: Iterator[str], where: str = "") -> None:
        if name in ("help", "h", "helpfull", "helpshort", "version"):
            self.parsed.help_word = self.parsed.help_word or (
                "" if value is not None and value.lower() in FALSE else name
            )
        elif name in ("helpmatch", "helpon"):
            wanted = value if value is not None else next(rest, "")
            self.parsed.help_word = self.parsed.help_word or f"{name}={wanted}"
        elif name in _SPECIAL:
            self._special(name, self._value(name, value, rest))
        elif name in self._bools:
            self.parsed.values.append((name, "true" if value is None else value))
        elif name in self._names:
            taken = self._value(name, value, rest)
            if taken is not None:
                self.parsed.values.append((name, taken))
        elif name.startswith("no") and name[2:] in self._bools:
            if value is not None:
                self.parsed.warnings.append(
                    f"--{name}={value} means {name[2:]}=false whatever its value"
                )
            self.parsed.values.append((name[2:], "false"))
        elif name.startswith("no") and name[2:] in self._names:
            self.parsed.errors.append(f"--{name}: {name[2:]} is no bool flag. Give it a value")
        else:
            self.parsed.unknown.append((name, where))

    def _value(self, name: str, value: str | None, rest: Iterator[str]) -> str | None:
        """The value behind `=`, or the next word whatever it looks like."""
        if value is None:
            value = next(rest, None)
            if value is None:
                self.parsed.errors.append(f"--{name} lacks a value. Write --{name}=VALUE")
        return value

    def _special(self, name: str, value: str | None) -> None:
        if value is None:
            return
        parts = [part for part in value.split(",") if part]
        if name == "undefok":
            self.parsed.tolerated |= {part.replace("-", "_") for part in parts}
        elif name == "flagfile":
            for part in parts:
                self._flagfile(part, 1)
        else:
            for part in parts:
                self._environment(part.replace("-", "_"), must=name == "fromenv")

    def _environment(self, name: str, *, must: bool) -> None:
        if name not in self._names:
            self.parsed.errors.append(
                f"--{'' if must else 'try'}fromenv names the unknown flag {name}"
            )
            return
        value = os.environ.get(f"FLAGS_{name}")
        if value is not None:
            self.parsed.values.append((name, value))
        elif must:
            self.parsed.errors.append(
                f"--fromenv={name}: FLAGS_{name} is not set. Set it or use --tryfromenv"
            )

    def _flagfile(self, path: str, depth: int) -> None:
        if depth > _MOST_NESTING:
            self.parsed.errors.append(f"--flagfile={path}: nested more than {_MOST_NESTING} deep")
            return
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.parsed.errors.append(f"--flagfile={path} cannot be read ({error}). Check the path")
            return
        counts = True
        for number, raw in enumerate(lines, start=1):
            line = raw.lstrip()
            if not line.strip() or line.startswith("#"):
                continue
            if not line.startswith("-"):
                counts = any(fnmatch.fnmatch(self._program, word) for word in line.split())
            elif counts:
                self._flagfile_line(line, f"{path}:{number}", depth)

    def _flagfile_line(self, line: str, where: str, depth: int) -> None:
        name, equals, value = line.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name == "flagfile":
            self._flagfile(value, depth + 1)
            return
        before = len(self.parsed.unknown)
        self._flag(name if equals else name.rstrip(), value if equals else None, iter(()), where)
        if len(self.parsed.unknown) > before:
            self.parsed.unknown.pop()
            self.parsed.warnings.append(f"{where}: unknown flag {name} is passed over")


class GflagsCommand(click.Command):
    """A click command whose words are read as gflags reads them."""

    ignored_prefixes: tuple[
        str, ...
    ] = ()  # names of the original that are passed over with a warning

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand, report every error at once, and give click one `--name=value` per flag."""
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        names = [str(param.name) for param in params]
        bools = [str(param.name) for param in params if isinstance(param.type, BoolType)]
        parsed = Expander(names, bools, ctx.info_name or "").expand(args)
        if parsed.help_word:
            ctx.meta["gflags.help"] = parsed.help_word
            return super().parse_args(ctx, [])
        self._pass_over(parsed)
        errors = [*parsed.errors, *self._complaints(names, parsed)]
        errors += _bad_values(ctx, {str(param.name): param for param in params}, parsed.values)
        if errors:
            raise CommandLineError(errors)
        ctx.meta["gflags.warnings"] = parsed.warnings
        last = dict(parsed.values)
        return super().parse_args(ctx, [f"--{name}={value}" for name, value in last.items()])

    def _pass_over(self, parsed: Parsed) -> None:
        """Flags of the original whose names are known by their prefix only."""
        over = [
            name for name, _ in parsed.unknown if name.startswith(self.ignored_prefixes or ("\0",))
        ]
        if over:
            parsed.unknown = [entry for entry in parsed.unknown if entry[0] not in over]
            names = ", ".join(f"--{name}" for name in over)
            parsed.warnings.append(f"flags of the original, ignored here: {names}")

    def _complaints(self, names: list[str], parsed: Parsed) -> list[str]:
        lines = []
        known = [*names, "help", "helpfull", "version", *_SPECIAL]
        for name, where in parsed.unknown:
            close = difflib.get_close_matches(name.removeprefix("no"), known, n=1, cutoff=0.6)
            hint = f"Did you mean --{close[0]}?" if close else "See --helpfull"
            lines.append(f"{where + ': ' if where else ''}unknown flag --{name}. {hint}")
        for word in parsed.positionals:
            hint = (
                "Write --flag=false"
                if word.lower() in TRUE | FALSE
                else "Every value belongs to a flag"
            )
            lines.append(f"stray word '{word}'. {hint}")
        return lines


def _bad_values(
    ctx: click.Context, params: dict[str, click.Option], values: Sequence[tuple[str, str]]
) -> list[str]:
    """gflags checks every value given, not only the last one."""
    errors = []
    for name, value in values:
        try:
            params[name].type.convert(value, params[name], ctx)
        except click.BadParameter as error:
            errors.append(f"--{name}: {error.message}. See --helpfull")
    return errors
