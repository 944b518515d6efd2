"""What following a grammar costs: a decode step of rows that follow a JSON schema, against one of rows that follow nothing.

A model's whole decode step with random weights, and a made-up tokenizer as large as its vocabulary. The masks are computed in a thread
beside the forward pass, so the ratio tells what of them does not hide there. One JSON line.

    python -m benchmarks.grammar_masks [--rows 16] [--threads 1] [--rounds 9] [--shape 0.5b]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.models import config_of
from benchmarks.report import emit, summary
from benchmarks.steps import decode_ms
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.executor import Executor
from xllm_py.core.plan import RowStart
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.ranks import open_executor

# never complete in so few steps, and nearly every token fits
SCHEMA = {"type": "array", "minItems": 100, "items": {"type": "string", "minLength": 200}}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})


def write_tokenizer(path: Path, size: int) -> None:
    """Single bytes, then words of two to six letters that are made up."""
    draw = random.Random(1)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < size:
        words["".join(draw.choices("abcdefghijklmnopqrstuvwxyzĠ", k=draw.randint(2, 6)))] = None
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def measure(executor: Executor, grammar: str, rounds: int, rows: int) -> list[float]:
    """Milliseconds of steps; the first two, which compile and warm up, do not count."""
    starts = tuple(
        RowStart(
            row=row,
            request_id=str(row),
            block_ids=(row,),
            sampling=SamplingParams(max_tokens=4000, seed=row, temperature=1.0, grammar=grammar),
        )
        for row in range(rows)
    )
    times = [
        decode_ms(executor, starts if not number else (), number, rows, number)
        for number in range(rounds + 2)
    ]
    return times[2:]


def main() -> None:
    """Rounds with and without, in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", default="0.5b")
    options = parser.parse_args()
    config = config_of(options.shape)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        write_tokenizer(Path(folder) / "tokenizer.json", config["vocab_size"])
        executor = open_executor(
            EngineConfig(
                model_path=folder,
                load_format="dummy",
                cpu_threads=options.threads,
                cache=CacheConfig(block_size=128, max_cache_bytes=1 << 30),
                scheduler=SchedulerConfig(max_seqs_per_batch=options.rows),
            )
        )
        plain, asked = [], []
        for _ in range(3):
            plain += measure(executor, "", options.rounds // 3, options.rows)
            asked += measure(executor, GRAMMAR, options.rounds // 3, options.rows)
        executor.close()
    without, with_grammar = summary(plain), summary(asked)
    figures = {
        "without_ms": without,
        "with_ms": with_grammar,
        "ratio": round(with_grammar["median"] / without["median"], 3),
    }
    emit("grammar_masks", vars(options), figures)


if __name__ == "__main__":
    main()
