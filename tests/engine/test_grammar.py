"""Rows that follow a grammar, through a real worker: what they say fits, wherever they begin, and a failing one fails alone."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import make_checkpoint
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.executor import Executor
from xllm_py.core.plan import RowStart, StepPlan, StepResult
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.grammar import Matchers
from xllm_py.engine.ranks import open_executor

EOS = 258
SCHEMA = {
    "type": "object",
    "properties": {
        "sort": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tame": {"type": "boolean"},
    },
    "required": ["sort", "legs", "tame"],
    "additionalProperties": False,
}


def grammar_of(schema: dict[str, object]) -> str:
    """Without blanks, which could go on for long."""
    terse = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return json.dumps({"grammars": [{"json_schema": terse}]})


GRAMMAR = grammar_of(SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=6, with_tokenizer=True)


@pytest.fixture
def executor(folder: Path) -> Iterator[Executor]:
    made = opened(folder)
    yield made
    made.close()


def opened(folder: Path, **fields: str) -> Executor:
    return open_executor(
        EngineConfig(
            model_path=str(folder),
            cpu_threads=1,
            cache=CacheConfig(block_size=16, max_cache_bytes=8 << 20),
            scheduler=SchedulerConfig(max_seqs_per_batch=4),
            **fields,  # type: ignore[arg-type]  # by name
        )
    )


def start(
    row: int, grammar: str = GRAMMAR, *, said: tuple[int, ...] = (), seed: int = 0, **fields: float
) -> RowStart:
    params: dict[str, float] = {"max_tokens": 100, "temperature": 1.0, **fields}
    return RowStart(
        row=row,
        request_id=f"r{row}",
        block_ids=tuple(range(row * 8, row * 8 + 8)),
        sampling=SamplingParams(seed=seed, grammar=grammar, **params),  # type: ignore[arg-type]  # by name
        stop_ids=frozenset({EOS}),
        prompt_ids=(5,),
        generated_ids=said,
    )


def step(
    executor: Executor, starts: tuple[RowStart, ...], known: dict[int, list[int]], draws: int = 1
) -> StepResult:
    """A token for each row of `known`, whose tokens include the prompt's one; rows that start compute all of theirs."""
    fresh = {each.row for each in starts}
    counts = [len(ids) if row in fresh else 1 for row, ids in known.items()]
    return executor.execute(
        StepPlan(
            step=1,
            started=starts,
            rows=list(known),
            num_tokens=counts,
            num_computed=[len(ids) - n for ids, n in zip(known.values(), counts, strict=True)],
            token_ids=[
                token
                for ids, n in zip(known.values(), counts, strict=True)
                for token in ids[len(ids) - n :]
            ],
            sample=[draws] * len(known),
            positions=[len(ids) - 1 for ids in known.values()],
        )
    )


def run(executor: Executor, *starts: RowStart) -> dict[int, list[int]]:
    """Every row to its end; what each said, its end left out."""
    known = {each.row: [5, *each.generated_ids] for each in starts}
    going = dict(known)
    fresh = starts
    for _ in range(120):
        result = step(executor, fresh, going)
        assert not result.failed_rows
        fresh = ()
        for row, token in zip(list(going), result.token_ids, strict=True):
            if token == EOS:
                del going[row]
            else:
                known[row].append(token)
        if not going:
            return {row: ids[1:] for row, ids in known.items()}
    raise AssertionError(f"no end: {known}")


def test_whatever_the_model_likes_the_answer_fits(folder: Path, executor: Executor) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = set()
    for seed in range(6):
        said = run(executor, *(start(row, seed=10 * seed + row) for row in range(3)))
        for ids in said.values():
            text = tokenizer.decode(ids)
            value = json.loads(text)
            assert set(value) == {"sort", "legs", "tame"}
            assert value["sort"] in ("cat", "dog")
            assert 0 <= value["legs"] <= 99
            assert isinstance(value["tame"], bool)
            found.add(text)
    assert len(found) > 10


def test_a_row_may_begin_anywhere(executor: Executor) -> None:
    (whole,) = run(executor, start(0, seed=3)).values()
    for at in range(1, len(whole), 5):
        (rest,) = run(executor, start(1, seed=3, said=tuple(whole[:at]))).values()
        assert rest == whole


def test_a_grammar_is_nothing_to_the_row_beside_it(executor: Executor) -> None:
    alone = step(executor, (start(0, ""),), {0: [5]}).token_ids
    beside = step(executor, (start(0, ""), start(1)), {0: [5], 1: [5]}).token_ids
    assert beside[:1] == alone


def test_choices_are_drawn_from_the_same_mask(folder: Path, executor: Executor) -> None:
    result = step(executor, (start(0, grammar_of({"enum": ["a", 7, None]})),), {0: [5]}, draws=40)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {tokenizer.decode([token]) for token in result.token_ids} == {'"', "7", "n"}


def test_an_answer_that_is_complete_and_cannot_grow_ends_before_min_tokens(
    executor: Executor,
) -> None:
    (said,) = run(executor, start(0, grammar_of({"const": 7}), min_tokens=5)).values()
    assert len(said) == 1
    (said,) = run(
        executor, start(0, grammar_of({"type": "integer", "minimum": 1}), min_tokens=5)
    ).values()
    assert len(said) >= 5


BAD = {
    '{"grammars":[{"lark_grammar":"start: nothing"}]}': "cannot be compiled",
    "no grammar": "cannot be compiled",
}


@pytest.mark.parametrize("grammar", BAD)
def test_a_grammar_that_cannot_be_followed_fails_its_row_alone(
    executor: Executor, grammar: str
) -> None:
    result = step(executor, (start(0), start(1, grammar)), {0: [5], 1: [5]})
    assert set(result.failed_rows) == {1}
    assert BAD[grammar] in result.failed_rows[1]
    assert result.token_ids[0] >= 0
    assert result.token_ids[1] == -1


def test_a_row_that_said_what_its_grammar_forbids_fails_alone(executor: Executor) -> None:
    result = step(executor, (start(0), start(1, said=(9, 9))), {0: [5], 1: [5, 9, 9]})
    assert set(result.failed_rows) == {1}
    assert "cannot be followed" in result.failed_rows[1]


def test_without_a_tokenizer_or_an_end_it_is_said_what_is_missing(
    folder: Path, tmp_path: Path
) -> None:
    matchers = Matchers(tmp_path, 320, (EOS,))
    matchers.start(start(0))
    matchers.begin([0])
    assert "tokenizer.json" in matchers.take().failed[0]
    matchers.close()
    endless = Matchers(folder, 320, ())
    said = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("7").ids
    one = start(0, grammar_of({"const": 7}), said=tuple(said))
    endless.start(dataclasses.replace(one, stop_ids=frozenset()))
    endless.begin([0])
    assert "nothing ends the answer" in endless.take().failed[0]
    endless.close()


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_processed_log_probabilities_are_those_of_what_the_grammar_allows(
    folder: Path, mode: str
) -> None:
    executor = opened(folder, logprobs_mode=mode)
    result = step(executor, (start(0, logprobs=3),), {0: [5]})
    executor.close()
    (token,) = result.token_ids
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).decode([token]) == "{"
    told = result.logprobs[0]
    if mode == "processed":  # nothing else may be said
        assert (told.logprob, told.top_ids[0], told.top_logprobs[0]) == (0.0, token, 0.0)
    else:  # what the model thought of it
        assert told.logprob < -1.0


def test_no_step_reads_the_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = llguidance.LLTokenizer
    seen = threading.Event()

    def reading(*args: Any, **fields: Any) -> Any:
        opened.append(threading.current_thread().name)
        tokenizer = read(*args, **fields)
        seen.set()
        return tokenizer

    monkeypatch.setattr(llguidance, "LLTokenizer", reading)
    matchers = Matchers(folder, 320, (EOS,))
    assert seen.wait(30.0), "it is read before anybody asks"
    matchers.start(start(0))
    matchers.begin([0])
    assert matchers.take().allowed
    assert len(opened) == 1 and opened[0].startswith("grammar")
    matchers.close()


def test_ids_the_tokenizer_does_not_have_are_never_allowed(folder: Path) -> None:
    matchers = Matchers(folder, 1000, (EOS,))
    matchers.start(start(0))
    matchers.begin([0])
    (allowed,) = matchers.take().allowed.values()
    assert allowed.shape == (1000,)
    assert not np.flatnonzero(allowed)[-1] > 258
    matchers.close()
