"""Which tokens go with which text, and the three shapes, whole and streamed."""

from __future__ import annotations

import json
import math

import pytest

from tests.openai.support import EchoBackend, ascii_ids, logprob_of
from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.sampling import SamplingParams
from xllm_py.openai.answer import Answer
from xllm_py.openai.backend import Delta
from xllm_py.openai.logprobs import chat_shape, completion_shape, of_prompt, prompt_shape
from xllm_py.openai.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


def run(tokenizer, text, piece, finish="length", **fields):
    """(text, tokens) of each step of an answer that is scored."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    answer = Answer(tokenizer, SamplingParams(max_tokens=99, seed=1, logprobs=0, **fields))
    steps = []
    for at in range(0, len(ids), piece):
        part = tuple(ids[at : at + piece])
        reason = finish if at + piece >= len(ids) else ""
        said = answer.take(
            Delta(
                position=at,
                token_ids=part,
                finish_reason=reason,
                logprobs=tuple(logprob_of(each, 0) for each in part),
            )
        )
        steps.append((said, [tokenizer.token_bytes(each.token_id) for each in answer.scored]))
        if answer.has_ended():
            break
    return answer, steps


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 50])
@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("abc", {}, b"a b c"),
        ("a☃b", {}, b"a \xe2 \x98 \x83 b"),
        ("ab||cd", {"stop": ("||",)}, b"a b"),
        ("ab||cd", {"stop": ("||",), "include_stop_str_in_output": True}, b"a b | |"),
        ("ab|", {"stop": ("||",)}, b"a b |"),
        ("ab<|end|>||cd", {"stop": ("||",)}, b"a b"),
        ("a<|end|>b||cd", {"stop": ("||",)}, b"a <|end|> b"),
        ("xa wide wordb", {"stop": ("de",)}, b"x a_wide_word"),
        ("☃", {"stop": ("☃",)}, b""),
        ("x<|end|>", {}, b"x <|end|>"),
    ],
)
def test_tokens_go_with_their_text_however_they_arrive(tokenizer, piece, text, fields, expected):
    answer, steps = run(tokenizer, text, piece, **fields)
    tokens = [token for _, found in steps for token in found]
    assert tokens == [token.replace(b"_", b" ") for token in expected.split()]
    for said, found in steps[:-1]:
        assert bool(said) == bool(found)
    ids = tokenizer.encode(text, add_special_tokens=False)[: answer.num_tokens]
    assert answer.score.total == sum(-token / 8 for token in ids)
    assert answer.score.num_tokens == len(ids)


def test_the_end_token_has_no_logprobs_unless_it_shows(tokenizer):
    answer, steps = run(tokenizer, "ab<|end|>", 9, finish="stop")
    assert steps == [("ab", [b"a", b"b"])]
    assert (answer.score.num_tokens, answer.score.total) == (3, -(64 + 65 + 257) / 8)
    fields = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    _, steps = run(tokenizer, "ab<|end|>", 9, finish="stop", **fields)
    assert steps == [("ab<|end|>", [b"a", b"b", b"<|end|>"])]


def test_the_completion_shape(tokenizer):
    (snow, *_) = tokenizer.encode("☃", add_special_tokens=False)
    tokens = of_prompt(
        tokenizer,
        (64, snow, 65),
        (
            TokenLogprob(logprob=-1.0, top_ids=(0, snow), top_logprobs=(-0.5, -1.0)),
            TokenLogprob(logprob=-math.inf, top_ids=(0, 1), top_logprobs=(-0.5, -math.inf)),
        ),
        "a\ufffdb",
    )
    assert completion_shape(tokenizer, tokens, 2) == {
        "tokens": ["a", "\ufffd", "b"],
        "token_logprobs": [None, -1.0, -9999.0],
        "top_logprobs": [
            None,
            {"!": -0.5, "\ufffd": -1.0},
            {"!": -0.5, '"': -9999.0, "b": -9999.0},
        ],
        "text_offset": [0, 1, 1],
    }


def test_the_chat_shape_has_exact_bytes(tokenizer):
    snow = tokenizer.encode("☃", add_special_tokens=False)[0]
    logprob = TokenLogprob(logprob=-1.0, top_ids=(0, 1, 2), top_logprobs=(-0.5, -2.0, -math.inf))
    answer = Answer(tokenizer, SamplingParams(max_tokens=9, seed=1, logprobs=3))
    answer.take(Delta(position=0, token_ids=(snow,), finish_reason="length", logprobs=(logprob,)))
    assert chat_shape(tokenizer, answer.scored, 2) == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -1.0,
                "bytes": [0xE2],
                "top_logprobs": [
                    {"token": "!", "logprob": -0.5, "bytes": [33]},
                    {"token": '"', "logprob": -2.0, "bytes": [34]},
                ],
            }
        ]
    }


def test_the_shape_of_prompt_logprobs(tokenizer):
    logprobs = (
        TokenLogprob(logprob=-3.0, top_ids=(0, 1), top_logprobs=(-0.5, -2.0)),
        TokenLogprob(logprob=-0.25, top_ids=(66,), top_logprobs=(-0.25,)),
    )
    assert prompt_shape(tokenizer, (64, 65, 66), logprobs, 1) == [
        None,
        {
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "!"},
            "65": {"logprob": -3.0, "rank": None, "decoded_token": "b"},
        },
        {"66": {"logprob": -0.25, "rank": 1, "decoded_token": "c"}},
    ]


def test_a_prompt_token_without_place_in_the_text_has_no_width(tokenizer):
    start = tokenizer.encode("<|start|>", add_special_tokens=False)[0]
    logprobs = [logprob_of(1, 0)] * 2
    tokens = of_prompt(tokenizer, (start, 64, 65), logprobs, "ab")
    assert [token.offset for token in tokens] == [0, 0, 1]


def joined(stream, index, key):
    """The logprobs of one choice of a stream, its chunks put together."""
    found: dict[str, list] = {}
    for event in stream.events[:-1]:
        for choice in event["choices"]:
            if choice["index"] == index and choice[key] is not None:
                for name, values in choice[key].items():
                    found.setdefault(name, []).extend(values)
    return found


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
@pytest.mark.parametrize("echo", [False, True])
async def test_streamed_logprobs_are_those_of_the_whole_answer(make, piece, echo):
    door = make(backend=EchoBackend(piece=piece))
    fields = {"logprobs": 2, "echo": echo, "n": 2, "stop": ["X"], "max_tokens": 30}
    prompts = ["a☃ <|end|>bXcd", "é"]
    whole = (await door.complete(prompts, **fields)).json()["choices"]
    stream = await door.complete(prompts, stream=True, **fields)
    for index in range(4):
        shape = whole[index]["logprobs"]
        assert joined(stream, index, "logprobs") == shape
        assert stream.text(index) == whole[index]["text"]
        assert len({len(values) for values in shape.values()}) == 1
    offsets = whole[0]["logprobs"]["text_offset"]
    if echo:
        assert offsets == [0, 1, 1, 1, 2, 3, 10, 11, 12, 13, 14, 15, 15, 15, 16, 17, 17]
    else:
        assert offsets == [0, 1, 1, 1, 2, 3, 3]


async def test_echo_with_logprobs_begins_with_null(door):
    (choice,) = (await door.complete("abc", echo=True, logprobs=1)).json()["choices"]
    assert choice["text"] == "abcabc"
    assert choice["logprobs"] == {
        "tokens": list("abcabc"),
        "token_logprobs": [None, -65 / 8, -66 / 8, -8.0, -65 / 8, -66 / 8],
        "top_logprobs": [
            None,
            *({"!": 0.0, each: -(ord(each) - 33) / 8} for each in "bcabc"),
        ],
        "text_offset": [0, 1, 2, 3, 4, 5],
    }


async def test_logprobs_zero_shows_the_token_alone(door):
    (choice,) = (await door.complete("ab", logprobs=0)).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-8.0, -65 / 8]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -8.0}, {"b": -65 / 8}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [None, 0, 2])
async def test_chat_logprobs(make, stream, top):
    door = make(backend=EchoBackend(say=lambda _: ascii_ids("ab")))
    answer = await door.chat("hi", logprobs=True, top_logprobs=top, stream=stream)
    if stream:
        content = joined(answer, 0, "logprobs")["content"]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [row["token"] for row in content] == ["a", "b"]
    assert [row["bytes"] for row in content] == [[97], [98]]
    assert [row["logprob"] for row in content] == [-8.0, -65 / 8]
    tops = [[each["token"] for each in row["top_logprobs"]] for row in content]
    assert tops == [["!", '"'][: top or 0]] * 2


async def test_chunks_without_tokens_carry_null(make):
    door = make(backend=EchoBackend(say=lambda _: ascii_ids("ab")))
    answer = await door.chat("hi", logprobs=True, stream=True)
    first, *texts, last = [event["choices"][0] for event in answer.events[:-1]]
    assert (first["logprobs"], last["logprobs"]) == (None, None)
    assert [len(each["logprobs"]["content"]) for each in texts] == [1, 1]


async def test_tokens_without_text_come_with_the_last_chunk(make):
    door = make(backend=EchoBackend(say=lambda _: (64, 257), finish="length"))
    answer = await door.complete("p", logprobs=0, stream=True)
    text, last = [event["choices"][0] for event in answer.events[:-1]]
    assert (text["text"], text["logprobs"]["tokens"]) == ("a", ["a"])
    assert (last["text"], last["logprobs"]["tokens"]) == ("", ["<|end|>"])
    assert last["finish_reason"] == "length"


async def test_the_winners_show_their_own_logprobs(make):
    words = ("cc", "ab", "d")
    door = make(backend=EchoBackend(candidates=lambda _, choice: ascii_ids(words[choice])))
    answer = await door.complete("p", best_of=3, n=2, logprobs=0)
    shapes = [choice["logprobs"] for choice in answer.json()["choices"]]
    assert [shape["tokens"] for shape in shapes] == [["c", "c"], ["a", "b"]]
    assert shapes[1]["token_logprobs"] == [-9.0, -65 / 8 - 1]


async def test_prompt_logprobs_stand_in_each_choice(door):
    answers = [
        await door.complete("ab", prompt_logprobs=1, n=2),
        await door.chat("hi", prompt_logprobs=1, n=2),
    ]
    for answer, submission in zip(answers, door.backend.submissions, strict=True):
        first, second = answer.json()["choices"]
        assert first["prompt_logprobs"] == second["prompt_logprobs"]
        assert first["prompt_logprobs"][0] is None
        assert len(first["prompt_logprobs"]) == len(submission.prompt_ids)
        assert first["logprobs"] is None
    shown = (await door.complete("ab", prompt_logprobs=1)).json()["choices"][0]
    assert shown["prompt_logprobs"][1] == {
        "0": {"logprob": 0.0, "rank": 1, "decoded_token": "!"},
        "65": {"logprob": -65 / 8, "rank": None, "decoded_token": "b"},
    }


async def test_a_prompt_of_one_token_has_only_null(door):
    (choice,) = (await door.complete("a", prompt_logprobs=1)).json()["choices"]
    assert choice["prompt_logprobs"] == [None]


async def test_other_choices_wait_for_the_prompts_logprobs(make):
    door = make(backend=EchoBackend(backwards=True, say=lambda _: ascii_ids("xy")))
    answer = await door.complete("ab", n=3, echo=True, logprobs=0, stream=True)
    for index in range(3):
        assert answer.text(index) == "abxy"
        assert joined(answer, index, "logprobs")["tokens"] == list("abxy")


async def test_many_logprobs_are_written_off_the_loop_alike(make):
    door = make()
    answer = await door.complete("ab" * 100, max_tokens=50, echo=True, logprobs=20)
    (choice,) = answer.json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == 250
    assert json.loads(answer.body)["usage"]["completion_tokens"] == 50
