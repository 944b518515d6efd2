"""Size is a feature: at most 400 lines a file and 60 a function. Prints the ten largest of both; exit 1 when a limit is passed.

    python scripts/sizes.py

Counted are xllm_py, benchmarks and scripts, without generated code. Called by `make sizes` and tests/arch/test_sizes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ("xllm_py", "benchmarks", "scripts")
GENERATED = ("xllm_py/control/pb/", "xllm_py/registry/etcd_stubs/")
FILE_LINES, FUNCTION_LINES = 400, 60
SHOWN = 10
EXCEPTIONS: Mapping[str, str] = {}  # place -> the reason why it is longer and has to be


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Lines of one file, or of one function from its `def` to its last line."""

    lines: int
    place: str  # `folder/file.py`, or `folder/file.py:Class.function`
    limit: int

    @property
    def over(self) -> bool:
        """Too long, and no reason is listed."""
        return self.lines > self.limit and self.place not in EXCEPTIONS


def sources(root: Path) -> list[Path]:
    """The files that count, relative to root, sorted."""
    found = (path.relative_to(root) for name in COUNTED for path in (root / name).rglob("*.py"))
    return sorted(path for path in found if not path.as_posix().startswith(GENERATED))


def sizes_of(text: str, place: str) -> list[Size]:
    """One file and all its functions, nested ones and methods too."""
    found = [Size(len(text.splitlines()), place, FILE_LINES)]
    found.extend(_functions(ast.parse(text), f"{place}:"))
    return found


def _functions(parent: ast.AST, prefix: str) -> Iterable[Size]:
    for node in ast.iter_child_nodes(parent):
        inside = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{prefix}{node.name}."
            if not isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Size(lines, inside[:-1], FUNCTION_LINES)
        yield from _functions(node, inside)


def measure(root: Path = ROOT) -> list[Size]:
    """Everything that counts, the longest first."""
    found: list[Size] = []
    for path in sources(root):
        found.extend(sizes_of((root / path).read_text(), path.as_posix()))
    return sorted(found, reverse=True)


def main() -> int:
    """Print and judge."""
    found = measure()
    for what, limit in (("files", FILE_LINES), ("functions", FUNCTION_LINES)):
        group = [size for size in found if size.limit == limit]
        lines = sum(size.lines for size in group) if what == "files" else None
        total = f", {lines} lines" if lines is not None else ""
        print(f"{len(group)} {what}{total}; the longest (limit {limit}):")
        for size in group[:SHOWN]:
            print(f"  {size.lines:5}  {size.place}")
    over = [size for size in found if size.over]
    for size in over:
        print(f"{size.place} has {size.lines} lines, the limit is {size.limit}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
