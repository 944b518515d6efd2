"""The package as text and as syntax trees, for the tests of the house rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("xllm_py/control/pb/", "xllm_py/registry/etcd_stubs/")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the package."""

    place: str  # relative to the checkout, with slashes
    tree: ast.Module

    @classmethod
    def of(cls, text: str, place: str = "xllm_py/core/example.py") -> Source:
        return cls(place, ast.parse(text))


def sources() -> list[Source]:
    """Every file we write ourselves."""
    found = []
    for path in sorted((ROOT / "xllm_py").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(GENERATED):
            found.append(Source.of(path.read_text(), place))
    assert len(found) > 100
    return found


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"
