"""The grid on a real model with the real worker and sampler: tiny, random weights, float32."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.grid.cases import cases
from tests.grid.cluster import Setup
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


# one case after the other takes longest: in two parts, each of which ends in time on a busy machine
WHOLE = [(setup, slice(None)) for setup in SETUPS if setup.name != "preempted"]
HALVES = [(setup, slice(at, None, 2)) for setup in SETUPS[-1:] for at in (0, 1)]


def _name(value: Setup | slice) -> str:
    if isinstance(value, Setup):
        return value.name
    return "all" if value.step is None else f"from {value.start}"


@pytest.mark.parametrize(("setup", "part"), WHOLE + HALVES, ids=_name)
async def test_every_case_is_answered_as_it_is_alone(
    setup: Setup, part: slice, folder: Path, asked: list[Asked]
) -> None:
    check(setup, asked[part], await ask_in(setup, make, folder, asked[part]))


def test_there_are_cases_enough(asked: list[Asked]) -> None:
    assert len(asked) * len(SETUPS) >= 2000


async def test_every_feature_changes_answers(folder: Path) -> None:
    await check_features(make, folder, NUM_IDS)
