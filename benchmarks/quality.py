"""What do 8-bit linears cost in quality? Perplexity of the demo model on its own corpus, and the angle of logits of random models.

    python -m benchmarks.quality

The demo model (models/xllm-demo) reads its corpus' conversations, each answer after the first of its held-out questions, with its own weights and
with --quantization=w8a8; the answers' tokens count. Random models of two shapes compute random prompts: cosine of the logits of each token, 8-bit against bfloat16.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from benchmarks.models import write_model
from benchmarks.report import emit
from xllm_py.device import open_device
from xllm_py.device.base import AttentionBatch, KvShape
from xllm_py.model import load_model, open_weights, pick_dtype, read_config

ROOT = Path(__file__).resolve().parents[1]
DEMO, CORPUS = ROOT / "models/xllm-demo", ROOT / "scripts/demo_corpus.md"
WINDOW, BLOCK = 256, 16
SYSTEM = "You are the demo model of xllm_py."  # as it was trained
SHAPES = ("5m", "0.5b")


class Forward:
    """A model that computes whole prompts of at most WINDOW tokens."""

    def __init__(self, folder: Path, quantization: str, load_format: str) -> None:
        config = read_config(folder)
        self._device = open_device("cpu:0", threads=0)
        dtype = pick_dtype("auto", config)
        self._model = load_model(
            config,
            self._device,
            open_weights(folder, dtype, load_format),
            max_position=WINDOW,
            quantization=quantization,
        )
        self._device.alloc_kv(
            KvShape(
                num_layers=config.num_layers,
                num_blocks=WINDOW // BLOCK,
                block_size=BLOCK,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                dtype=dtype,
            )
        )

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """[tokens, vocabulary]."""
        count = len(ids)
        batch = AttentionBatch(
            block_tables=torch.arange(WINDOW // BLOCK, dtype=torch.int32)[None],
            first_tokens=torch.tensor([0]),
            num_tokens=torch.tensor([count]),
            context_tokens=torch.tensor([count]),
            slots=torch.arange(count),
        )
        padding = (0, -count % self._device.row_padding())
        padded = functional.pad(ids, padding)
        hidden = self._model.forward(padded, functional.pad(torch.arange(count), padding), batch)
        return self._model.logits(hidden[:count])


def perplexity(model: Forward, talks: list[tuple[Tensor, int]]) -> float:
    """Of the answers' tokens; each conversation comes with the index of its answer."""
    losses = [
        functional.cross_entropy(
            model.logits(ids)[first - 1 : -1], ids[first:], reduction="sum"
        ).item()
        for ids, first in talks
    ]
    return math.exp(sum(losses) / sum(len(ids) - first for ids, first in talks))


def conversations(tokenizer: Tokenizer) -> list[tuple[Tensor, int]]:
    """Token ids of every topic with a held-out question, and where its answer begins."""
    found = []
    for part in CORPUS.read_text().split("\n## ")[1:]:
        lines = part.splitlines()
        asked = [line[2:].strip() for line in lines if line.startswith("? ")]
        answer = " ".join(line[2:].strip() for line in lines if line.startswith("> "))
        if not asked:
            continue
        head = f"<|im_start|>user\n{asked[0]}<|im_end|>\n<|im_start|>assistant\n"
        start = tokenizer.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{head}").ids
        ids = start + tokenizer.encode(f"{answer}<|im_end|>").ids
        found.append((torch.tensor(ids[:WINDOW]), len(start)))
    return found


def main() -> None:
    """Print both rows."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    talks = conversations(tokenizer)
    plain, eight = (perplexity(Forward(DEMO, each, "auto"), talks) for each in ("", "w8a8"))
    emit(
        "w8a8 perplexity",
        {"model": DEMO.name, "answers": len(talks)},
        {"plain": round(plain, 6), "w8a8": round(eight, 6), "ratio": round(eight / plain, 6)},
    )
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as place:
            folder = write_model(Path(place) / shape, shape)
            prompt = torch.randint(8000, (WINDOW,), generator=torch.Generator().manual_seed(0))
            both = [Forward(folder, each, "dummy").logits(prompt) for each in ("", "w8a8")]
        cosine = functional.cosine_similarity(*both, dim=-1)
        same = (both[0].argmax(-1) == both[1].argmax(-1)).float().mean()
        found = {"least": round(float(cosine.min()), 5), "mean": round(float(cosine.mean()), 5)}
        emit("w8a8 cosine", {"shape": shape}, {**found, "same_choice": round(float(same), 3)})


if __name__ == "__main__":
    main()
