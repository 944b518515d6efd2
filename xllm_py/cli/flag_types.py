"""The value types of gflags 2.2.2 as click types, with the ranges of their C types and gflags' ideas of a good word."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

TRUE = frozenset({"1", "t", "true", "y", "yes"})
FALSE = frozenset({"0", "f", "false", "n", "no"})
SPACE = " \t\n\v\f\r"  # what C calls space
_DECIMAL = re.compile(rf"[{SPACE}]*[+-]?[0-9]+")
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+")
_REAL = re.compile(rf"[{SPACE}]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HEXADECIMAL_REAL = re.compile(
    rf"[{SPACE}]*[+-]?0[xX]([0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)([pP][+-]?[0-9]+)?"
)
_INFINITE = re.compile(rf"[{SPACE}]*[+-]?(inf|infinity|nan)", re.IGNORECASE)
_MOST_DIGITS = 40


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

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The two words people write."""
        return [CompletionItem(word) for word in ("true", "false") if word.startswith(incomplete)]


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
        hexadecimal = _HEXADECIMAL.fullmatch(word) is not None
        good = hexadecimal or _DECIMAL.fullmatch(word) is not None
        if not good or (self._low == 0 and "-" in word):
            self.fail(f"'{value}' is no {self.name}", param, ctx)
        long = len(word.lstrip(SPACE + "+-0xX")) > _MOST_DIGITS
        number = self._high + 1 if long else int(word, 16 if hexadecimal else 10)
        if not self._low <= number <= self._high:
            self.fail(f"{value} does not fit into {self.name}", param, ctx)
        return number


class DoubleType(click.ParamType[Any]):
    """A finite floating-point number."""

    name = "double"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Trailing characters, infinities and numbers too small to be exact are errors."""
        if isinstance(value, float):
            return value
        word = str(value)
        if _INFINITE.fullmatch(word):
            self.fail(f"{value} is not finite", param, ctx)
        if _HEXADECIMAL_REAL.fullmatch(word):
            number = _from_hexadecimal(word)
        elif _REAL.fullmatch(word):
            number = float(word)
        else:
            self.fail(f"'{value}' is no double", param, ctx)
        mantissa = re.split("[pP]" if "x" in word.lower() else "[eE]", word)[0]
        nothing = re.search("[1-9a-fA-F]", mantissa) is None
        if math.isinf(number) or (abs(number) < sys.float_info.min and not nothing):
            self.fail(f"{value} does not fit into double", param, ctx)
        return number


def _from_hexadecimal(word: str) -> float:
    try:
        return float.fromhex(word)
    except OverflowError:
        return math.inf


BOOL = BoolType()
INT32 = IntType("int32", -(2**31), 2**31 - 1)
UINT32 = IntType("uint32", 0, 2**32 - 1)
INT64 = IntType("int64", -(2**63), 2**63 - 1)
DOUBLE = DoubleType()
STRING = click.STRING
