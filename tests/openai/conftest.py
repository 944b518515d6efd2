"""Fixtures of the door's tests: one model folder and one template child for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.openai.support import Door, load_template, make_door, write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def template(model_folder: Path) -> Generator[Any, None, None]:
    loaded = load_template(model_folder)
    yield loaded
    loaded.close()


@pytest.fixture
async def make(model_folder: Path, template: Any) -> AsyncGenerator[Callable[..., Door], None]:
    """Makes doors and checks, at the end, that none of them left anything open."""
    doors: list[Door] = []

    def build(**options: Any) -> Door:
        doors.append(make_door(model_folder, template=template, **options))
        return doors[-1]

    yield build
    for door in doors:
        assert door.app.num_open == 0
        assert door.backend.num_open == 0
        await door.app.close()


@pytest.fixture
def door(make: Callable[..., Door]) -> Door:
    return make()
