"""Greedy tokens in float32 equal those of transformers: 64 prompts of 64 tokens for each of three shapes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.engine.rig import Rig

COUNT = 64
LENGTHS = (
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    100,
    127,
    128,
    129,
    255,
    256,
    257,
    400,
    511,
    512,
    513,
    700,
)
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"hidden_size": 64, "heads": 4, "kv_heads": 2, "layers": 2, "tied": True},
    "untied, odd heads": {
        "hidden_size": 112,
        "heads": 7,
        "kv_heads": 1,
        "layers": 3,
        "intermediate": 100,
    },
    "large vocabulary": {
        "hidden_size": 48,
        "heads": 3,
        "kv_heads": 3,
        "layers": 2,
        "vocab_size": 151_936,
    },
}
ENGINES: dict[str, dict[str, int]] = {
    "tied": {"block_size": 16},
    "untied, odd heads": {"block_size": 128, "chunk": 512},
    "large vocabulary": {"block_size": 32, "chunk": 100},
}


def oracle(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy decoding by transformers, one prompt at a time, with its own cache."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids, cache, answer = torch.tensor([prompt]), None, []
            for _ in range(COUNT):
                out = theirs(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                answer.append(int(ids))
            answers.append(answer)
    return answers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, shape: str) -> None:
    fields = SHAPES[shape]
    model = make_checkpoint(tmp_path, seed=11, shards=2, **fields)
    vocabulary = fields.get("vocab_size", 320)
    chooser = random.Random(6)
    lengths = [*LENGTHS, *(chooser.randrange(1, 701) for _ in range(64 - len(LENGTHS)))]
    prompts = [[chooser.randrange(vocabulary) for _ in range(n)] for n in lengths]
    rig = Rig(model, cache_bytes=64 << 20, **ENGINES[shape])
    rig.executor.worker.observer = None  # 64 x 64 rows of a large vocabulary are gigabytes
    for number, prompt in enumerate(prompts):
        rig.add(str(number), prompt, COUNT)
    ours = rig.run()
    theirs = oracle(model, prompts)
    wrong = [len(prompts[i]) for i, answer in enumerate(theirs) if ours[str(i)] != answer]
    assert not wrong, f"prompts of these lengths differ: {wrong}"
