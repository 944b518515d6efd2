"""The grid on the toy executor: whatever a request asks for, and whichever way it goes, its client receives the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.checkpoints import make_tokenizer
from tests.grid.cases import cases
from tests.grid.grid import SETUPS, Asked, ask_alone, ask_in, check, check_features
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.executor import Executor
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.toy import ToyExecutor, lone_run

OF_TOKENS = (  # fields of a body that decide over tokens, under their own names
    *("max_tokens", "temperature", "seed", "top_k", "top_p", "min_p", "min_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
NO_GRAMMARS = frozenset({"schema"})  # the toy refuses them
NUM_IDS = 256  # those that are bytes, so that prompts have text


def make(config: EngineConfig, num_blocks: int) -> Executor:
    return ToyExecutor(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
async def asked(folder: Path) -> AsyncGenerator[list[Asked], None]:
    yield await ask_alone(make, folder, cases(NUM_IDS, NO_GRAMMARS))


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
async def test_every_case_is_answered_as_it_is_alone(setup, folder, asked) -> None:
    check(setup, asked, await ask_in(setup, make, folder, asked))


def test_the_lone_answers_are_those_of_each_candidate_by_itself(asked: list[Asked]) -> None:
    """A reference that is wrong in the same way as the columns would agree with them."""
    config = EngineConfig(toy_num_blocks=64, cache=CacheConfig(block_size=4))
    for each in asked:
        body = each.body
        fields = {name: body[name] for name in OF_TOKENS if name in body}
        bias = tuple((int(key), value) for key, value in body.get("logit_bias", {}).items())
        sampling = SamplingParams(
            **{**fields, "stop_token_ids": tuple(body.get("stop_token_ids", ()))},
            logit_bias=bias,
        )
        for choice, tokens in enumerate(each.tokens):
            alone = lone_run(ToyExecutor(config), each.case.prompt, sampling, choice)
            assert tokens == alone.token_ids[: len(tokens)], each.body


def test_there_are_cases_enough(asked: list[Asked]) -> None:
    assert len(asked) * len(SETUPS) >= 2000


async def test_every_feature_changes_answers(folder: Path) -> None:
    await check_features(make, folder, NUM_IDS, NO_GRAMMARS)
