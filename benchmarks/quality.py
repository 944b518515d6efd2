"""What do 8-bit linears cost in quality? Perplexity of the demo model on its own corpus, and the angle of logits of random models.

    python -m benchmarks.quality

The demo model (models/xllm-demo) reads scripts/demo_corpus.md, which it was trained on, in windows of 256 tokens, with its own weights and with
--quantization=w8a8. Random models of two shapes compute random prompts: cosine of the logits of each token, 8-bit against bfloat16.
"""

from __future__ import annotations

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
from xllm_py.model import load_model, pick_dtype, read_config

ROOT = Path(__file__).resolve().parents[1]
DEMO, CORPUS = ROOT / "models/xllm-demo", ROOT / "scripts/demo_corpus.md"
WINDOW, BLOCK = 256, 16
SHAPES = ("5m", "0.5b")


class Forward:
    """A model that computes whole prompts of at most WINDOW tokens."""

    def __init__(self, folder: Path, quantization: str, load_format: str) -> None:
        config = read_config(folder)
        self._device = open_device("cpu:0", threads=0)
        dtype = pick_dtype("auto", config)
        self._model = load_model(
            folder,
            config,
            self._device,
            dtype=dtype,
            load_format=load_format,
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


def perplexity(model: Forward, windows: list[Tensor]) -> float:
    """Of every token but the first of each window."""
    losses = [
        functional.cross_entropy(model.logits(ids)[:-1], ids[1:], reduction="sum").item()
        for ids in windows
    ]
    return float(torch.tensor(sum(losses) / sum(len(ids) - 1 for ids in windows)).exp())


def main() -> None:
    """Print both rows."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(CORPUS.read_text()).ids)
    windows = [window for window in ids.split(WINDOW) if len(window) > 1]
    plain, eight = (perplexity(Forward(DEMO, each, "auto"), windows) for each in ("", "w8a8"))
    emit(
        "w8a8 perplexity",
        {"model": DEMO.name, "tokens": len(ids)},
        {"plain": round(plain, 4), "w8a8": round(eight, 4), "ratio": round(eight / plain, 4)},
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
