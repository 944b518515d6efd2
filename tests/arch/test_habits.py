"""Habits a linter has no rule for: who may catch everything, no globals that change, no hidden imports, rooms that say what they are."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.arch.source import Source, imported, sources

# The edges where whatever went wrong ends one request, one call, one task or one step, and nothing else.
EDGES = {
    "xllm_py/base/tasks.py": 1,  # the task family asks a task that ended
    "xllm_py/control/server.py": 2,  # the gRPC edge: a unary call, a stream
    "xllm_py/engine/loop.py": 1,  # the top of the engine loop: the executor
    "xllm_py/openai/app.py": 1,  # the ASGI app
}
# No edges: a library that raises bare Exception is read here, and what it raises becomes an error of ours at once.
DOORS = {
    "xllm_py/openai/tokenizer.py": 1,  # tokenizers, for a broken file
}
EVERYTHING = {"Exception", "BaseException"}


def _names(node: ast.expr | None) -> set[str]:
    if node is None:
        return EVERYTHING
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def catch_alls(source: Source) -> Iterator[int]:
    """Lines that stop whatever comes. A handler that ends with a bare `raise` only tidies up and lets it pass."""
    for node in ast.walk(source.tree):
        caught: set[str] = set()
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            if not (isinstance(last, ast.Raise) and last.exc is None):
                caught = _names(node.type)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = set().union(*map(_names, node.args))
        elif isinstance(node, ast.Call) and ast.unparse(node).endswith(".exception()"):
            caught = EVERYTHING  # a task or a future hands over as a value whatever it raised
        if caught & EVERYTHING:
            yield node.lineno


def globals_written(source: Source) -> Iterator[int]:
    """Lines with a `global` statement."""
    return (node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.Global))


def hidden_imports(source: Source) -> Iterator[int]:
    """Lines that import by a string: no contract sees those. Reading a package's version is no import."""
    for line, name in imported(source.tree):
        if name.split(".")[0] == "importlib" and not name.startswith("importlib.metadata"):
            yield line
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "exec", "eval"}:
            yield node.lineno


def test_everything_is_caught_at_the_named_edges_only() -> None:
    found = Counter(source.place for source in sources() for _ in catch_alls(source))
    assert dict(found) == EDGES | DOORS


def test_no_module_state_is_written_from_a_function() -> None:
    found = [f"{source.place}:{line}" for source in sources() for line in globals_written(source)]
    assert not found, "\n".join(found)


def test_nothing_is_imported_by_a_string() -> None:
    found = [f"{source.place}:{line}" for source in sources() for line in hidden_imports(source)]
    assert not found, "\n".join(found)


def test_every_package_says_what_it_is() -> None:
    rooms = [source for source in sources() if source.place.endswith("/__init__.py")]
    silent = [room.place for room in rooms if not (ast.get_docstring(room.tree) or "").strip()]
    assert len(rooms) > 10
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize(
    "handler, caught",
    [
        ("except Exception:\n    pass", 1),
        ("except BaseException as error:\n    raise ValueError from error", 1),
        ("except:\n    pass", 1),
        ("except (OSError, Exception):\n    pass", 1),
        ("except BaseException:\n    close()\n    raise", 0),
        ("except OSError:\n    pass", 0),
    ],
)
def test_a_handler_counts_when_it_stops_everything(handler: str, caught: int) -> None:
    assert len(list(catch_alls(Source.of(f"try:\n    work()\n{handler}")))) == caught


def test_asking_a_future_and_suppressing_everything_count_too() -> None:
    assert list(catch_alls(Source.of("error = task.exception()"))) == [1]
    assert list(catch_alls(Source.of("_log.exception('it failed', label=label)"))) == []
    assert list(catch_alls(Source.of("with contextlib.suppress(Exception):\n    work()"))) == [1]
    assert list(catch_alls(Source.of("with suppress(OSError):\n    work()"))) == []


def test_a_global_statement_and_imports_by_string_are_seen() -> None:
    assert list(globals_written(Source.of("def f() -> None:\n    global x\n    x = 1"))) == [2]
    for text in ("import importlib", "from importlib import import_module", "__import__('torch')"):
        assert list(hidden_imports(Source.of(text))) == [1]
    assert list(hidden_imports(Source.of("from importlib import metadata"))) == []
