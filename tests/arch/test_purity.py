"""What decides may import only what cannot look at the world. The linter forbids by name; this allows by name."""

from __future__ import annotations

import pytest

from tests.arch.source import Source, imported, sources

STDLIB = {
    "__future__",
    "abc",
    "array",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "struct",
    "types",
    "typing",
    "zlib",
}
BASE = ("xllm_py.base.errors", "xllm_py.base.hashing", "xllm_py.base.logprob")
# a pure place -> what of ours it may import: its own floor's package and the pure ones below
OURS = {
    "xllm_py/base/errors.py": (),
    "xllm_py/base/hashing.py": ("xxhash",),
    "xllm_py/core/": (*BASE, "xllm_py.core"),
    "xllm_py/cluster/": (*BASE, "xllm_py.cluster"),
    "xllm_py/wire/": (*BASE, "xllm_py.core", "xllm_py.cluster", "xllm_py.wire"),
}


def impurities(source: Source) -> list[str]:
    """Every import of a pure file that is not allowed; nothing for other files."""
    allowed = next((ours for place, ours in OURS.items() if source.place.startswith(place)), None)
    if allowed is None:
        return []
    return [
        f"{source.place}:{line} imports {name}"
        for line, name in imported(source.tree)
        if name.partition(".")[0] not in STDLIB
        and not any(f"{name}.".startswith(f"{ours}.") for ours in allowed)
    ]


def test_what_decides_imports_only_what_cannot_look_at_the_world() -> None:
    found = [line for source in sources() for line in impurities(source)]
    assert not found, "\n".join(found)


def test_every_pure_place_exists() -> None:
    places = [source.place for source in sources()]
    for pure in OURS:
        assert [place for place in places if place.startswith(pure)], pure


@pytest.mark.parametrize(
    "text",
    [
        "import time",
        "import os.path",
        "from random import random",
        "def decide() -> None:\n    import sys",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket",
        "import numpy",
        "from xllm_py.base import log",
        "from xllm_py.base.clock import Clock",
        "from xllm_py.base import errors, clock",
        "from xllm_py.cluster.routing import choose",
        "from xllm_py.corelike import x",
        "from . import plan",
    ],
)
def test_a_pure_file_that_imports_the_world_is_reported(text: str) -> None:
    assert len(impurities(Source.of(text, "xllm_py/core/example.py"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "from __future__ import annotations\nimport json, math\nfrom collections.abc import Sequence",
        "from xllm_py.base.errors import InvalidValue\nfrom xllm_py.base import hashing",
        "from xllm_py.core import handoff\nfrom xllm_py.core.plan import StepPlan",
    ],
)
def test_a_pure_file_may_import_data_and_its_own_floor(text: str) -> None:
    assert impurities(Source.of(text, "xllm_py/core/example.py")) == []
