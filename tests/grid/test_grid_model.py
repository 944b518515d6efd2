"""The grid on a real model with the real worker and sampler: tiny, random weights, float32."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.grid.cases import cases
from tests.grid.grid import SETUPS, Asked, ask_alone, ask_in, check, check_features
from tests.grid.model import make

NUM_IDS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"),
        seed=4,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate=48,
        with_tokenizer=True,
    )


@pytest.fixture(scope="module")
async def asked(folder: Path) -> AsyncGenerator[list[Asked], None]:
    yield await ask_alone(make, folder, cases(NUM_IDS))


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
async def test_every_case_is_answered_as_it_is_alone(setup, folder, asked) -> None:
    check(setup, asked, await ask_in(setup, make, folder, asked))


def test_there_are_cases_enough(asked: list[Asked]) -> None:
    assert len(asked) * len(SETUPS) >= 2000


async def test_every_feature_changes_answers(folder: Path) -> None:
    await check_features(make, folder, NUM_IDS)
