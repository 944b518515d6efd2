"""One suite for every model family: transformers computes the same in float32, and a token has its bits in any company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.devices import DEVICE
from tests.engine.rig import Rig
from tests.families import CASES, VOCABULARY, make_family
from tests.forward import our_logits
from xllm_py.device import open_device
from xllm_py.model import FAMILIES, load_model, open_weights, read_config

COUNT = 40
# at 600 a decoded token of a sliding window sees none of the first 512 keys
LENGTHS = (1, 17, 100, 130, 600)
Answers = dict[tuple[str, int], torch.Tensor]


def prompt_of(length: int) -> list[int]:
    chooser = random.Random(length)
    return [chooser.randrange(VOCABULARY) for _ in range(length)]


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("model"), CASES[request.param], seed=3)


@pytest.fixture(scope="module")
def theirs(model: Path) -> torch.nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def their_logits(theirs: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = theirs(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def test_every_family_has_a_case() -> None:
    assert {fields["model_type"] for fields in CASES.values()} == set(FAMILIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [1, 130, 600])
def test_logits_of_every_position_are_those_of_transformers(
    model: Path, theirs: torch.nn.Module, length: int
) -> None:
    ids = prompt_of(length)
    ours, wanted = our_logits(model, ids), their_logits(theirs, ids)
    off = (ours - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    assert off.max() < 1e-4, f"position {int(off.argmax())}: {float(off.max()):.2e}"


@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers(model: Path, theirs: torch.nn.Module) -> None:
    rig = Rig(model, chunk=48)
    for length in LENGTHS:
        rig.add(str(length), prompt_of(length), COUNT)
    ours = rig.run()
    for length in LENGTHS:
        # each token is their choice after the ones before it, so the whole answer is their greedy one
        choices = their_logits(theirs, prompt_of(length) + ours[str(length)]).argmax(-1)
        assert ours[str(length)] == choices[length - 1 : -1].tolist(), f"prompt of {length}"
        assert len(ours[str(length)]) == COUNT


# ---- to the bit ----


def add_all(rig: Rig, prefix: str = "") -> None:
    for length in LENGTHS:
        rig.add(f"{prefix}{length}", prompt_of(length), 8, temperature=0.8, seed=9)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def alone(model: Path, dtype: str) -> Answers:
    """The reference: one prompt after the other, each computed whole, in blocks of 128."""
    rig = Rig(model, dtype=dtype, block_size=128, max_seqs=1)
    add_all(rig)
    rig.run()
    return rig.logits


def same(left: Answers, right: Answers) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different, different


@pytest.mark.parametrize("chunk", [16, 50, 10240])
def test_logits_do_not_depend_on_chunks_or_neighbours(
    model: Path, alone: Answers, dtype: str, chunk: int
) -> None:
    rig = Rig(model, dtype=dtype, chunk=chunk)
    add_all(rig)
    rig.run()
    same(rig.logits, alone)


def test_logits_do_not_depend_on_what_was_cached(model: Path, alone: Answers, dtype: str) -> None:
    rig = Rig(model, dtype=dtype, chunk=50, prefix_root=b"root")
    for round_ in ("first ", "again "):
        add_all(rig, round_)
        rig.run()
    assert rig.scheduler.ledger()["prefix_hit_tokens"] >= 16 + 96 + 128
    for round_ in ("first ", "again "):
        told = {
            (name.removeprefix(round_), position): logits
            for (name, position), logits in rig.logits.items()
            if name.startswith(round_)
        }
        same(told, alone)


def test_dummy_weights_fit_every_family(model: Path) -> None:
    config, device = read_config(model), open_device(DEVICE, threads=1)
    made = load_model(config, device, open_weights(model, torch.float32, "dummy"), max_position=64)
    assert made.logits(device.put(torch.zeros(3, config.hidden_size))).shape == (3, VOCABULARY)
