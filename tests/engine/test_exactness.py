"""The promise the whole project stands on: a token's logits are the same bits however they were computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint, make_int8
from tests.engine.rig import Rig
from xllm_py.engine.sampler import Sampler

SHAPES = {
    "tied": {
        "hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "intermediate": 96,
        "tied": True,
    },
    "odd heads": {"hidden_size": 112, "heads": 7, "kv_heads": 1, "layers": 2, "intermediate": 100},
    "untied": {"hidden_size": 96, "heads": 6, "kv_heads": 3, "layers": 2, "intermediate": 200},
}
AWKWARD = (
    {"hidden_size": 50, "heads": 5, "kv_heads": 1, "head_dim": 24, "intermediate": 101},
    {"hidden_size": 100, "heads": 3, "kv_heads": 3, "head_dim": 40, "intermediate": 33},
    {"hidden_size": 97, "heads": 4, "kv_heads": 2, "head_dim": 80, "intermediate": 257},
)
LENGTHS = (1, 3, 16, 17, 130, 513)
COUNT = 8
SAMPLINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 9},
    {"temperature": 1.2, "seed": 8, "top_k": 20},
    {"temperature": 1.0, "seed": 7, "top_p": 0.8},
    {"temperature": 1.5, "seed": 6, "min_p": 0.02},
)

Answers = dict[tuple[str, int], torch.Tensor]


@pytest.fixture(
    scope="module",
    params=[*[(s, d) for s in SHAPES for d in ("float32", "bfloat16")], ("odd heads", "8-bit")],
    ids=str,
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape, dtype = request.param
    folder = tmp_path_factory.mktemp("model")
    plain = "float32" if dtype == "8-bit" else dtype
    make_checkpoint(folder, seed=5, dtype=plain, **SHAPES[shape])  # type: ignore[arg-type]  # fields by name
    return make_int8(folder) if dtype == "8-bit" else folder


def prompts() -> dict[str, list[int]]:
    """One prompt of each length."""
    chooser = random.Random(3)
    return {f"p{n}": [chooser.randrange(320) for _ in range(n)] for n in LENGTHS}


@pytest.fixture(scope="module")
def alone(model: Path) -> Answers:
    """The reference: every prompt computed whole, alone, in blocks of 128."""
    seen: Answers = {}
    for name, prompt in prompts().items():
        rig = Rig(model, block_size=128)
        rig.add(name, prompt, COUNT, temperature=0.8, seed=9)
        rig.run()
        seen |= rig.logits
    return seen


def same(left: Answers, right: Answers) -> None:
    """Bit for bit, for every token of every request."""
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different, different


@pytest.mark.parametrize("chunk", [16, 64, 512, 10240])
def test_logits_do_not_depend_on_chunks_or_neighbours(
    model: Path, alone: Answers, chunk: int
) -> None:
    rig = Rig(model, block_size=16, chunk=chunk)
    for name, prompt in prompts().items():
        rig.add(name, prompt, COUNT, temperature=0.8, seed=9)
    rig.run()
    same(rig.logits, alone)


def test_logits_do_not_depend_on_who_came_when(model: Path, alone: Answers) -> None:
    rig = Rig(model, block_size=32, chunk=100)
    chooser = random.Random(1)
    order = list(prompts().items())
    chooser.shuffle(order)
    for name, prompt in order:
        rig.add(name, prompt, COUNT, temperature=0.8, seed=9)
        for _ in range(chooser.randrange(4)):
            rig.step()
    rig.run()
    same(rig.logits, alone)


def test_tokens_and_logits_do_not_depend_on_steps_begun_ahead(model: Path) -> None:
    rigs = [Rig(model, chunk=100, ahead=ahead) for ahead in (False, True)]
    for rig in rigs:
        for name, prompt in prompts().items():
            rig.add(name, prompt, 3 * COUNT)
            rig.step()
        rig.run()
    plain, ahead = rigs
    assert ahead.num_ahead > COUNT
    assert ahead.tokens == plain.tokens
    same(ahead.logits, plain.logits)


def test_tokens_are_the_same_drawn_where_the_logits_are_or_on_the_host(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of its own is asked for what only draws; the cpu has no choice."""
    asked: tuple[dict[str, float], ...] = (
        {},
        {"temperature": 0.9},
        {"temperature": 0.9, "top_p": 0.5, "top_k": 40},
        {"temperature": 0.9, "logprobs": 2},
        {"temperature": 0.9, "presence_penalty": 1.0},
        {"temperature": 0.9, "min_tokens": 3},
    )
    told = []
    for alone in (True, False):
        if not alone:
            monkeypatch.setattr(Sampler, "only_draws", lambda self, row: False)
        rig = Rig(model)
        for number, (name, prompt) in enumerate(prompts().items()):
            rig.add(name, prompt, COUNT, **{"seed": number, **asked[number % len(asked)]})
        told.append(rig.run())
    assert told[0] == told[1]


def test_logits_do_not_depend_on_prompts_going_first(model: Path, alone: Answers) -> None:
    rig = Rig(model, block_size=16, chunk=100, mix_batch=False)
    for name, prompt in prompts().items():
        rig.add(name, prompt, COUNT, temperature=0.8, seed=9)
        rig.step()
    rig.run()
    same(rig.logits, alone)


@pytest.mark.parametrize("chunk", [16, 10240])
def test_logits_do_not_depend_on_what_was_cached(model: Path, alone: Answers, chunk: int) -> None:
    rig = Rig(model, block_size=16, chunk=chunk, prefix_root=b"root")
    for round_ in ("first", "again"):
        for name, prompt in prompts().items():
            rig.add(f"{round_} {name}", prompt, COUNT, temperature=0.8, seed=9)
        rig.run()
    assert rig.scheduler.ledger()["prefix_hit_tokens"] > sum(LENGTHS) // 2
    for round_ in ("first", "again"):
        told = {
            (name.removeprefix(f"{round_} "), position): logits
            for (name, position), logits in rig.logits.items()
            if name.startswith(round_)
        }
        same(told, alone)


def test_logits_and_seeded_tokens_survive_preemption(model: Path) -> None:
    many = {f"p{n}": [(7 * n + i * i) % 320 for i in range(36 + n)] for n in range(5)}
    count = 24
    samplings = dict(zip(many, SAMPLINGS, strict=True))
    reference: Answers = {}
    tokens: dict[str, list[int]] = {}
    for name, prompt in many.items():
        lone = Rig(model, block_size=4)
        lone.add(name, prompt, count, **samplings[name])
        tokens |= lone.run()
        reference |= lone.logits
        layout = lone.executor.kv_memory().layout
    # all prompts fit, their answers do not
    blocks = sum(-(-len(prompt) // 4) for prompt in many.values()) + 6
    rig = Rig(model, block_size=4, cache_bytes=blocks * layout.block_bytes * layout.num_layers * 2)
    for name, prompt in many.items():
        rig.add(name, prompt, count, **samplings[name])
    assert rig.run() == tokens
    assert rig.num_starts > len(many)  # somebody had to begin again
    same(rig.logits, reference)


@pytest.mark.parametrize("threads", [1, 2])
def test_seeded_tokens_are_the_same_alone_and_together(model: Path, threads: int) -> None:
    together = Rig(model, threads=threads)
    for name, prompt in prompts().items():
        together.add(name, prompt, COUNT, temperature=1.1, seed=4, top_p=0.9, top_k=40, min_p=0.01)
    tokens = together.run()
    for name, prompt in prompts().items():
        lone = Rig(model, threads=threads)
        lone.add(name, prompt, COUNT, temperature=1.1, seed=4, top_p=0.9, top_k=40, min_p=0.01)
        assert lone.run()[name] == tokens[name]


def test_stale_cache_contents_never_leak(model: Path, alone: Answers) -> None:
    rig = Rig(model, block_size=16)
    memory = rig.executor.kv_memory()
    for layer in range(memory.layout.num_layers):
        for part in range(2):
            memory.span(layer, part, 0, memory.num_blocks)[:] = b"\xff" * (
                memory.num_blocks * memory.layout.block_bytes  # NaN in float32 and bfloat16
            )
    for name, prompt in prompts().items():
        rig.add(name, prompt, COUNT, temperature=0.8, seed=9)
    rig.run()
    same(rig.logits, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_logits_of_awkward_shapes_do_not_depend_on_33_rows(
    tmp_path: Path, shape: dict[str, int], dtype: str
) -> None:
    model = make_checkpoint(tmp_path, seed=7, vocab_size=331, layers=1, dtype=dtype, **shape)
    chooser = random.Random(2)
    lengths = [1111, 1024, 2, *(chooser.randrange(1, 60) for _ in range(30))]
    many = {f"p{i}": [chooser.randrange(331) for _ in range(n)] for i, n in enumerate(lengths)}
    rig = Rig(model, chunk=300)
    for name, prompt in many.items():
        rig.add(name, prompt, 20, temperature=1.0, seed=5)
        rig.step()
    rig.run()
    lone = Rig(model, block_size=128, max_seqs=1)  # one after the other
    for name, prompt in many.items():
        lone.add(name, prompt, 20, temperature=1.0, seed=5)
    lone.run()
    same(rig.logits, lone.logits)
