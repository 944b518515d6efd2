"""Typed access to the fields of one JSON object of a model folder; what is wrong is one line that names file and field.

Used by model/config, model/rope_config and the families. It knows no model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from xllm_py.base.errors import ModelLoadError


class Fields:
    """One JSON object. A field that is null counts as one that is not there."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.raw = raw
        self._prefix = prefix  # of the names in error texts: "rope_scaling."

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The object in a file. Raises ModelLoadError when there is none."""
        try:
            raw: Any = json.loads(path.read_text())
        except OSError as error:
            raise ModelLoadError(
                f"{path}: cannot be read ({error.strerror}); is this a model folder?"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(
                f"{path}: is not JSON ({error}); copy the model folder again"
            ) from error
        if not isinstance(raw, dict):
            raise ModelLoadError(f"{path}: is not a JSON object; copy the model folder again")
        return cls(path, raw)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise ModelLoadError: file, field, cause and fix."""
        raise ModelLoadError(f"{self.path}: field {self._prefix}{name} {why}")

    def get(self, name: str) -> Any:
        """The value as it is, None when it is not there."""
        return self.raw.get(name)

    def part(self, name: str) -> Fields | None:
        """A nested object, None when it is missing or empty."""
        value = self.get(name)
        if not value and not isinstance(value, bool | int | float | str):
            return None
        if not isinstance(value, dict):
            self.refuse(name, f"is {_short(value)}, not a JSON object; correct it or take it out")
        return Fields(self.path, value, f"{self._prefix}{name}.")

    def text(self, name: str) -> str:
        """A string."""
        value = self.get(name)
        if not isinstance(value, str):
            self.refuse(name, "is missing or no text; copy the model folder again")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(name, f"is {_short(value)}; true or false is needed")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(name, f"is {_short(value)}; a positive integer is needed")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A finite number above 0 and not below `least`."""
        value = self.get(name)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not max(least, math.ulp(0.0)) <= value < math.inf
        ):
            needed = f"a number of at least {least:g}" if least else "a positive number"
            self.refuse(name, f"is {_short(value)}; {needed} is needed")
        return float(value)

    def items(self, name: str) -> list[Any]:
        """A list, empty when it is not there."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(name, f"is {_short(value)}, not a list; correct it or take it out")
        return value


def _short(value: Any) -> str:
    """On one line, and not a page of it."""
    return (value if isinstance(value, str) else json.dumps(value))[:80].replace("\n", " ")
