"""One choice: what counts, what shows, and why it ends."""

from __future__ import annotations

import pytest

from xllm_py.base.errors import InternalServerError
from xllm_py.core.sampling import SamplingParams
from xllm_py.openai.answer import Answer
from xllm_py.openai.backend import Delta
from xllm_py.openai.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


def run(tokenizer, text, *, piece=1, finish="length", **fields):
    """The answer and its text when `text`'s tokens come in pieces."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    answer = Answer(tokenizer, SamplingParams(max_tokens=99, seed=1, **fields))
    said = ""
    for at in range(0, len(ids), piece):
        reason = finish if at + piece >= len(ids) else ""
        said += answer.take(
            Delta(position=at, token_ids=tuple(ids[at : at + piece]), finish_reason=reason)
        )
        if answer.has_ended():
            break
    return answer, said


@pytest.mark.parametrize("piece", [1, 2, 3, 50])
def test_tokens_after_a_stop_string_are_neither_shown_nor_counted(tokenizer, piece):
    answer, said = run(tokenizer, "one\n\ntwo", piece=piece, stop=("\n\n",))
    assert (said, answer.finish_reason, answer.num_tokens) == ("one", "stop", 5)


def test_the_stop_string_is_shown_when_asked_for(tokenizer):
    _, said = run(tokenizer, "one.two", stop=(".",), include_stop_str_in_output=True)
    assert said == "one."


def test_an_end_token_counts_but_does_not_show(tokenizer):
    answer, said = run(tokenizer, "yes<|end|>", finish="stop", skip_special_tokens=False)
    assert (said, answer.num_tokens, answer.finish_reason) == ("yes", 4, "stop")


def test_an_end_token_shows_when_asked_for(tokenizer):
    _, said = run(
        tokenizer,
        "yes<|end|>",
        finish="stop",
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert said == "yes<|end|>"


def test_a_stop_token_id_does_not_show(tokenizer):
    (dot,) = tokenizer.encode(".", add_special_tokens=False)
    answer, said = run(tokenizer, "yes.", finish="stop", stop_token_ids=(dot,))
    assert (said, answer.num_tokens) == ("yes", 4)


def test_half_a_character_at_the_end_is_replaced(tokenizer):
    answer = Answer(tokenizer, SamplingParams(max_tokens=2, seed=1))
    ids = tuple(tokenizer.encode("☃", add_special_tokens=False)[:2])
    said = answer.take(Delta(position=0, token_ids=ids, finish_reason="length"))
    assert said == "\ufffd"


def test_held_back_text_comes_at_the_end(tokenizer):
    answer, said = run(tokenizer, "one\n", stop=("\n\n",))
    assert (said, answer.finish_reason) == ("one\n", "length")


def test_a_gap_in_the_positions_is_an_error(tokenizer):
    answer = Answer(tokenizer, SamplingParams(max_tokens=9, seed=1))
    answer.take(Delta(position=0, token_ids=(70,)))
    with pytest.raises(InternalServerError):
        answer.take(Delta(position=2, token_ids=(70,)))
