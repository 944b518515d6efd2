"""gflags 2.2.2 syntax on top of click: a command mix-in that rewrites the command line before click parses it.

It knows names, values, `--noflag`, dashes for underscores, --flagfile, --fromenv, --tryfromenv, --undefok and the help variants, and
hands clean `--name=value` words to click, whose types, defaults and errors stay in charge. Differences from gflags are those
of SPEC 1.2: exit codes, a stray positional is an error, blanks-only words are passed over with a warning. All errors of one
command line are reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from xllm_py.cli.flag_types import FALSE, SPACE, TRUE, BoolType

_MOST_NESTING = 16
_SPECIAL = ("flagfile", "fromenv", "tryfromenv", "undefok")
_HELP = ("help", "h", "helpfull", "helpshort", "version")
_WITH_WORD = ("helpmatch", "helpon")


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
    unknown: list[tuple[str, str]] = field(default_factory=list)  # name, by which flag it came
    unknown_in_files: list[tuple[str, str]] = field(default_factory=list)  # name, file and line
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tolerated: frozenset[str] = frozenset()
    help_word: str = ""
    bare_bools: dict[str, str] = field(
        default_factory=dict
    )  # stray word -> the bool it stood behind

    def without(self, is_fine: Callable[[str], bool]) -> Parsed:
        """The same, but for unknown flags that are fine."""
        return dataclasses.replace(
            self,
            unknown=[entry for entry in self.unknown if not is_fine(entry[0])],
            unknown_in_files=[entry for entry in self.unknown_in_files if not is_fine(entry[0])],
        )


class Expander:
    """Turns words into (name, value) pairs along gflags' rules.

    `bools` are the names of bool flags, `names` of all flags, `programs` the names that flagfiles may call this one by.
    """

    def __init__(self, names: Sequence[str], bools: Sequence[str], programs: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._bools = frozenset(bools)
        self._programs = tuple(programs)
        self._reading: list[str] = []  # flagfiles, the innermost last
        self.parsed = Parsed()

    def expand(self, words: Sequence[str]) -> Parsed:
        """The whole command line."""
        rest, before = iter(words), ""
        for word in rest:
            if word == "--":
                self.parsed.positionals += list(rest)
                break
            self._word(word, rest)
            name = before.lstrip("-").replace("-", "_")
            if name in self._bools:
                self.parsed.bare_bools[word] = name
            before = word
        return self.parsed.without(self._is_tolerated)

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
        if name in _HELP:
            self.parsed.help_word = self.parsed.help_word or (
                "" if value is not None and value.lower() in FALSE else name
            )
        elif name in _WITH_WORD:
            wanted = self._value(name, value, rest)
            self.parsed.help_word = self.parsed.help_word or f"{name}={wanted or ''}"
        elif name in _SPECIAL:
            self._special(name, self._value(name, value, rest))
        elif name in self._bools:
            self.parsed.values.append((name, "true" if value is None else value))
        elif name in self._names:
            taken = self._value(name, value, rest)
            if taken is not None:
                self.parsed.values.append((name, taken))
        elif name.startswith("no"):
            self._negated(name, value, where)
        else:
            self._unknown(name, where)

    def _unknown(self, name: str, where: str) -> None:
        parsed = self.parsed
        (parsed.unknown_in_files if where else parsed.unknown).append((name, where))

    def _negated(self, name: str, value: str | None, where: str) -> None:
        """`--noflag`, or a name that merely begins with `no`."""
        positive = name[2:]
        if positive in self._bools or positive in _HELP:
            if value is not None:
                self.parsed.warnings.append(
                    f"--{name}={value} means {positive}=false whatever its value"
                )
            if positive in self._bools:
                self.parsed.values.append((positive, "false"))
        elif positive in self._names and not where:
            self.parsed.errors.append(f"--{name}: {positive} is no bool flag. Give it a value")
        else:
            self._unknown(name, where)

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
        parts = value.removesuffix(",").split(",") if value else []
        if not all(parts):
            self.parsed.errors.append(f"--{name}={value} holds an empty name. Leave it out")
        elif name == "undefok":
            self.parsed.tolerated = frozenset(part.replace("-", "_") for part in parts)
        elif name == "flagfile":
            for part in parts:
                self._flagfile(part)
        else:
            for part in parts:
                self._environment(part.replace("-", "_"), must=name == "fromenv")

    def _environment(self, name: str, *, must: bool) -> None:
        if name not in self._names:
            self.parsed.unknown.append((name, f"--{'' if must else 'try'}fromenv"))
            return
        value = os.environ.get(f"FLAGS_{name}")
        if value is not None:
            self.parsed.values.append((name, value))
        elif must:
            self.parsed.errors.append(
                f"--fromenv={name}: FLAGS_{name} is not set. Set it or use --tryfromenv"
            )

    def _flagfile(self, path: str) -> None:
        if len(self._reading) >= _MOST_NESTING or path in self._reading:
            self.parsed.errors.append(
                f"--flagfile={path} is nested in itself or more than {_MOST_NESTING} deep. Split it up"
            )
            return
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            self.parsed.errors.append(f"--flagfile={path} cannot be read ({error}). Check the path")
            return
        self._reading.append(path)
        self._flagfile_text(text, path)
        self._reading.pop()

    def _flagfile_text(self, text: str, path: str) -> None:
        """Lines without a dash name programs; several of them in a row are one list."""
        counts, in_programs = True, False
        for number, raw in enumerate(text.split("\n"), start=1):
            line = raw.lstrip(SPACE)
            if not line or line.startswith("#"):
                continue
            if line.startswith("-"):
                in_programs = False
                if counts:
                    self._flagfile_line(line, f"{path}:{number}")
            else:
                counts = self._names_us(line) or (counts and in_programs)
                in_programs = True

    def _names_us(self, line: str) -> bool:
        return any(
            fnmatch.fnmatchcase(program, glob)
            for glob in line.split(" ")
            for program in self._programs
        )

    def _flagfile_line(self, line: str, where: str) -> None:
        """What gflags passes over silently in a flagfile is passed over with a warning."""
        name, equals, value = line.removeprefix("-").removeprefix("-").partition("=")
        name = name.replace("-", "_")
        if (
            not equals
            and name not in self._bools
            and name in (*self._names, *_SPECIAL, *_WITH_WORD)
        ):
            self.parsed.warnings.append(f"{where}: --{name} lacks a value and is passed over")
            return
        self._flag(name, value if equals else None, iter(()), where)


class GflagsCommand(click.Command):
    """A click command whose words are read as gflags reads them."""

    # names of the original that are passed over with a warning
    ignored_prefixes: tuple[str, ...] = ()
    # names that no hint suggests
    unsuggested: frozenset[str] = frozenset()
    # further names that flagfiles may call this program by
    aliases: tuple[str, ...] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand, report every error at once, and give click one `--name=value` per flag."""
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        names = [str(param.name) for param in params]
        bools = [str(param.name) for param in params if isinstance(param.type, BoolType)]
        parsed = Expander(names, bools, (ctx.info_name or "", *self.aliases)).expand(args)
        if parsed.help_word:
            ctx.meta["gflags.help"] = parsed.help_word
            return super().parse_args(ctx, [])
        passed_over = [*parsed.unknown, *parsed.unknown_in_files]
        parsed = parsed.without(self.is_passed_over)
        errors = [*parsed.errors, *self._complaints(names, parsed)]
        errors += _bad_values(ctx, {str(param.name): param for param in params}, parsed.values)
        if errors and not ctx.resilient_parsing:
            raise CommandLineError(errors)
        ctx.meta["gflags.passed_over"] = [
            name for name, _ in passed_over if self.is_passed_over(name)
        ]
        ctx.meta["gflags.warnings"] = [
            *parsed.warnings,
            *(
                f"{where}: --{name} is unknown here, passed over"
                for name, where in parsed.unknown_in_files
            ),
        ]
        last = dict(parsed.values)
        return super().parse_args(ctx, [f"--{name}={value}" for name, value in last.items()])

    def is_passed_over(self, name: str) -> bool:
        """Whether it is a flag of the original that is known by its prefix only."""
        return bool(self.ignored_prefixes) and name.removeprefix("no").startswith(
            self.ignored_prefixes
        )

    def _complaints(self, names: list[str], parsed: Parsed) -> list[str]:
        lines = []
        known = [name for name in names if name not in self.unsuggested]
        known += [*_HELP, *_WITH_WORD, *_SPECIAL]
        for name, where in parsed.unknown:
            close = difflib.get_close_matches(name.removeprefix("no"), known, n=1, cutoff=0.6)
            hint = f"Did you mean --{close[0]}?" if close else "See --helpfull"
            lines.append(f"{where + ': ' if where else ''}unknown flag --{name}. {hint}")
        for word in parsed.positionals:
            flag = parsed.bare_bools.get(word, "flag")
            meant = word.lower() in TRUE | FALSE
            hint = f"Write --{flag}={word}" if meant else "Every value belongs to a flag"
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
