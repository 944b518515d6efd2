"""n and best_of through the door: indices, ranking, usage, streams, and ends that differ."""

from __future__ import annotations

import pytest

from tests.openai.support import EchoBackend, ascii_ids, check_error
from xllm_py.base.logprob import TokenLogprob

# averages of the echo's logprobs: the lower its letters the likelier a word
WORDS = ("dddd", "bb", "aaa", "cXc")


def flat(token, num_top, choice):
    return TokenLogprob(logprob=-token / 8)


def speaker(*words, **switches):
    """A backend whose candidates say one word each, the prompt before it."""
    return EchoBackend(
        candidates=lambda submission, choice: submission.prompt_ids + ascii_ids(words[choice]),
        score=flat,
        **switches,
    )


def texts(answer):
    return [choice["text"] for choice in answer.json()["choices"]]


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("backwards", [False, True])
async def test_n_choices_stand_in_their_order_whole_and_streamed(make, piece, backwards):
    door = make(backend=speaker(*WORDS, piece=piece, backwards=backwards))
    answer = await door.complete("p", n=4)
    assert texts(answer) == ["pdddd", "pbb", "paaa", "pcXc"]
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2, 3]
    stream = await door.complete("p", n=4, stream=True)
    assert [stream.text(index) for index in range(4)] == texts(answer)
    assert stream.finishes() == dict.fromkeys(range(4), "stop")
    assert stream.events[-1] == "[DONE]"
    assert "x-xllm-stream" not in stream.headers


async def test_several_prompts_with_n_count_on(make):
    door = make(backend=speaker(*WORDS))
    answer = await door.complete(["p", "q"], n=3)
    assert texts(answer) == ["pdddd", "pbb", "paaa", "qdddd", "qbb", "qaaa"]
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(6))
    stream = await door.complete(["p", "q"], n=3, stream=True)
    assert [stream.text(index) for index in range(6)] == texts(answer)


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_the_best_are_shown_in_the_order_of_their_rank(make, n):
    door = make(backend=speaker(*WORDS))
    answer = await door.complete(["p", "q"], n=n, best_of=4, stop="X")
    ranked = ["c", "aaa", "dddd"]  # the average knows of the X that is cut
    assert texts(answer) == ["p" + word for word in ranked[:n]] + ["q" + w for w in ranked[:n]]
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(2 * n))
    assert all(choice["logprobs"] is None for choice in answer.json()["choices"])


async def test_equally_likely_candidates_stand_by_their_index(make):
    backend = speaker("ab", "ba", "zz", "ab")
    answer = await make(backend=backend).complete("p", n=3, best_of=4)
    assert texts(answer) == ["pab", "pba", "pab"]


async def test_usage_counts_every_candidate_and_each_prompt_once(make):
    door = make(backend=speaker(*WORDS, cached_tokens=1))
    usage = (await door.complete(["pp", "q"], best_of=4)).json()["usage"]
    num = sum(map(len, WORDS))
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": (num + 4 * 2) + (num + 4 * 1),
        "total_tokens": 3 + 2 * num + 12,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert door.metric("xllm_generation_tokens_total") == 2 * num + 12
    assert door.metric("xllm_prompt_tokens_total") == 3
    assert door.metric("xllm_cached_prompt_tokens_total") == 2


async def test_best_of_above_n_turns_the_stream_into_one_body(make):
    door = make(backend=speaker(*WORDS))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await door.complete("p", n=2, best_of=3, **options)
    assert answer.status == 200
    assert answer.headers["x-xllm-stream"] == "off; reason=best_of"
    assert answer.headers["content-type"] == "application/json"
    assert texts(answer) == ["paaa", "pdddd"]
    unasked = await door.complete("p", n=2, best_of=3)
    assert "x-xllm-stream" not in unasked.headers


async def test_chat_choices_have_a_role_each(make):
    door = make(backend=EchoBackend(candidates=lambda _, at: ascii_ids(WORDS[at]), score=flat))
    stream = await door.chat("hi", n=2, stream=True)
    roles = [
        choice["index"]
        for event in stream.events[:-1]
        for choice in event["choices"]
        if choice["delta"].get("role") == "assistant"
    ]
    assert sorted(roles) == [0, 1]
    assert (stream.text(0), stream.text(1)) == ("dddd", "bb")
    answer = (await door.chat("hi", best_of=4, n=2)).json()
    assert [c["message"]["content"] for c in answer["choices"]] == ["cXc", "aaa"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("piece", [1, 2, 100])
async def test_a_stop_string_ends_one_choice_and_the_others_go_on(make, stream, piece):
    door = make(backend=speaker("aXbbbbbb", "cccccc", piece=piece))
    answer = await door.complete("p", n=2, stop="X", stream=stream)
    found = [answer.text(0), answer.text(1)] if stream else texts(answer)
    assert found == ["pa", "pcccccc"]
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] == 3 + 7


async def test_the_generator_is_closed_when_all_choices_are_at_their_stop(make):
    door = make(backend=speaker("aX" + "b" * 50, "ccX" + "d" * 50))
    answer = await door.complete("p", n=2, stop="X")
    assert texts(answer) == ["pa", "pcc"]
    assert door.backend.closed_early == [answer.json()["id"]]
    assert door.backend.num_tokens < 12


async def test_ids_of_events_name_the_choice(make):
    door = make(backend=speaker("a", "b"))
    answer = await door.complete("p", n=2, stream=True)
    request_id = door.backend.submissions[0].request_id
    lines = [line for line in answer.body.decode().splitlines() if line.startswith("id: ")]
    assert sorted(lines) == [f"id: {request_id}:{c}:{p}" for c in range(2) for p in range(2)]


async def test_a_choice_nobody_asked_for_is_an_internal_error(make):
    class Stranger(EchoBackend):
        def _delta(self, submission, choice, whole, at):
            return (
                super()
                ._delta(submission, choice, whole, at)
                .__class__(choice=1, position=0, token_ids=(1,), finish_reason="stop")
            )

    door = make(backend=Stranger())
    check_error(await door.complete("x"), 500, "internal_error", None)


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"best_of": 2}, {"prompt_logprobs": 0}])
async def test_a_backend_that_owes_logprobs_is_an_internal_error(make, fields):
    door = make(backend=EchoBackend(unscored=True))
    check_error(await door.complete("xy", **fields), 500, "internal_error", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("skip", [False, True])
async def test_echo_puts_the_prompt_before_every_choice(make, stream, skip):
    door = make(backend=EchoBackend(candidates=lambda _, choice: ascii_ids("ab"[choice])))
    prompts = ["h☃", "x<|end|>y"]
    answer = await door.complete(prompts, n=2, echo=True, stream=stream, skip_special_tokens=skip)
    found = [answer.text(index) for index in range(4)] if stream else texts(answer)
    assert found == ["h☃a", "h☃b", "x<|end|>ya", "x<|end|>yb"]


async def test_echo_of_ids_is_their_text(make):
    door = make(backend=EchoBackend(say=lambda _: ascii_ids("z")))
    assert texts(await door.complete([list(ascii_ids("hey")), [64]], echo=True)) == ["heyz", "az"]


async def test_echo_and_best_of_go_together(make):
    door = make(backend=speaker(*WORDS))
    assert texts(await door.complete("p", best_of=4, echo=True)) == ["ppcXc"]
