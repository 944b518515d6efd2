"""Every model family through prefill and decode on two engines: text and logprobs are those of one engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make_tokenizer
from tests.families import CASES, VOCABULARY, make_family
from tests.grid.cases import cases
from tests.grid.grid import SETUPS, ask_alone, ask_in, check
from tests.grid.model import make

FAMILIES = (
    "llama",
    "llama, llama3 rope, tied",
    "mistral, window",
    "qwen3",
    "qwen3, tied, biases, dynamic rope",
    "qwen3_moe",
    "qwen3_moe, some layers dense",
)
NUM_CASES = 30


@pytest.mark.parametrize("family", FAMILIES)
async def test_two_engines_answer_as_one_does(family: str, tmp_path: Path) -> None:
    make_family(tmp_path, CASES[family])
    make_tokenizer(tmp_path)
    wanted = [case for case in cases(VOCABULARY) if "logprobs" in case.features][:NUM_CASES]
    asked = await ask_alone(make, tmp_path, wanted)
    for setup in SETUPS:
        if setup.is_pd or setup.name == "DEFAULT":
            check(setup, asked, await ask_in(setup, make, tmp_path, asked))
