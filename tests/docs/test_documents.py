"""The documents name files, functions, rooms and flags that exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from xllm_py.cli import master_flags, xllm_flags

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xllm_py"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
)
_QUOTED = re.compile(r"`([^`\n]+)`")
_IN_FILE = re.compile(
    r"(?P<path>[a-z_0-9]+(?:/[a-z_0-9]+)+)(?:\.(?P<name>[A-Za-z_]\w*(?:\.\w+)?))?"
)
_IN_CLASS = re.compile(r"(?P<name>_?[A-Z]\w*\.[a-z_]\w*)")
_FLAG = re.compile(r"--([a-z][a-z0-9_]*)")
_ROW = re.compile(r"\| `(?P<room>[a-z]+)` \| (?P<text>.+) \|")
_OTHERS = {"embedded", "fd"}  # words of other command lines than the daemons'


def quoted(document: str) -> list[str]:
    return _QUOTED.findall((ROOT / document).read_text(encoding="utf-8"))


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Top-level names of a file, and `Class.attribute` of its classes."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for name in attributes(node)}
    return frozenset(found)


def attributes(node: ast.ClassDef) -> set[str]:
    """Methods, fields, and what methods assign to self."""
    found = {
        sub.name for sub in node.body if isinstance(sub, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for sub in ast.walk(node):
        if isinstance(sub, ast.AnnAssign) and isinstance(sub.target, ast.Name):
            found.add(sub.target.id)
        if isinstance(sub, ast.Attribute) and isinstance(sub.ctx, ast.Store):
            found.add(sub.attr)
    return found


@functools.cache
def all_names() -> frozenset[str]:
    files = [
        path for path in PACKAGE.rglob("*.py") if not path.parent.name.endswith(("pb", "stubs"))
    ]
    return frozenset().union(*map(names_in, files))


def file_of(path: str) -> Path | None:
    for base in (PACKAGE, ROOT):
        for found in (base / f"{path}.py", base / path):
            if found.exists():
                return found
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_functions_that_a_document_names_exist(document: str) -> None:
    for word in quoted(document):
        if (ROOT / word).exists():
            continue
        match = _IN_FILE.fullmatch(word)
        if match:
            path = file_of(match["path"])
            assert path is not None, word
            assert match["name"] is None or match["name"] in names_in(path), word
        match = _IN_CLASS.fullmatch(word)
        if match:
            assert match["name"] in all_names(), word


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_a_document_names_exist(document: str) -> None:
    known = {flag.name for flag in (*xllm_flags.TABLE, *master_flags.TABLE)}
    special = {"flagfile", "fromenv", "undefok", "help", "helpfull", "version"}
    for word in quoted(document):
        for name in _FLAG.findall(word):
            assert name in known | special | _OTHERS, word


def test_every_room_has_its_line_and_names_only_files_it_has() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {match["room"]: match["text"] for match in _ROW.finditer(text)}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(rooms) == packages
    for room, row in rooms.items():
        for name in _QUOTED.findall(row):
            places = [PACKAGE / room / f"{name}.py", PACKAGE / room / name]
            assert any(place.exists() for place in places), f"{room}: {name}"


def test_decisions_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
