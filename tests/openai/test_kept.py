"""Answers with an Idempotency-Key: one production, any number of readers, from wherever they like."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.openai.support import Call, Door, EchoBackend, check_error
from xllm_py.base.clock import HandClock
from xllm_py.base.errors import IdempotencyConflict, InvalidValue, QueueFull
from xllm_py.core.request import MAX_ORIGIN
from xllm_py.openai.backend import Told
from xllm_py.openai.kept import (
    KEEP_S,
    MOST_KEY,
    KeptAnswers,
    Origin,
    place_after,
    unpacked,
)

PROMPT = "abcdefghij"
BODY = {"model": "tiny", "prompt": PROMPT, "stream": True}


def post(door: Door, key: str, body: object = None, **headers: str) -> Call:
    sent = {"idempotency-key": key} | {k.replace("_", "-"): v for k, v in headers.items()}
    return door.call("POST", "/v1/completions", body or BODY, headers=sent)


def id_of(answer: object) -> str:
    return str(answer.events[0]["id"])  # type: ignore[attr-defined]


async def test_a_second_request_gets_the_first_ones_answer(make) -> None:
    door = make()
    first = await post(door, "k").done()
    second = await post(door, "k").done()
    assert first.text() == PROMPT
    assert second.body == first.body
    assert len(door.backend.submissions) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_readers_that_come_while_it_grows_share_one_production(make, stream: bool) -> None:
    door = make(backend=EchoBackend(hold_at=4))
    body = {**BODY, "stream": stream}
    calls = [post(door, "k", body) for _ in range(5)]
    await door.backend.until(lambda: door.backend.num_tokens == 4, "half of it")
    calls.append(post(door, "k", body))
    await asyncio.sleep(0.01)
    door.backend.release.set()
    answers = [await call.done() for call in calls]
    assert {answer.body for answer in answers} == {answers[0].body}
    assert answers[0].complete
    assert len(door.backend.submissions) == 1


async def test_a_client_that_left_goes_on_behind_what_it_saw(make) -> None:
    door = make(backend=EchoBackend(hold_at=4))
    call = post(door, "k")
    await door.backend.until(lambda: call.answer.text() == "abcd", "half of it")
    call.leave()
    await call.done()
    assert door.backend.num_open == 1  # it goes on without a reader
    request_id = id_of(call.answer)
    rest = door.call("GET", f"/v1/streams/{request_id}?starting_after=3")
    late = post(door, "k", last_event_id=f"{request_id}:0:1")
    door.backend.release.set()
    assert (await rest.done()).text() == "efghij"
    assert (await late.done()).text() == "cdefghij"
    assert rest.answer.events[-1] == "[DONE]"
    from_start = await door.ask("GET", f"/v1/streams/{request_id}")
    assert from_start.text() == PROMPT


async def test_where_events_hold_one_token_each_any_position_is_a_place_to_go_on(make) -> None:
    door = make(backend=EchoBackend(piece=4))
    request_id = id_of(await post(door, "k").done())
    for position in range(len(PROMPT)):
        path = f"/v1/streams/{request_id}?starting_after={position}"
        assert (await door.ask("GET", path)).text() == PROMPT[position + 1 :]


async def test_seeds_come_from_key_and_body_and_tenant(make) -> None:
    seeds = set()
    for _ in range(2):  # another door is another master
        door = make(api_keys={"ann": "first-key", "bob": "second-key"})
        for key in ("first-key", "second-key"):
            for name, prompt in (("k", "x"), ("l", "x"), ("m", "y")):
                headers = {"authorization": f"Bearer {key}", "idempotency-key": name}
                body = {"model": "tiny", "prompt": prompt}
                await door.ask("POST", "/v1/completions", body, headers=headers)
        seeds.add(tuple(each.sampling.seed for each in door.backend.submissions))
    (one,) = seeds
    assert len(set(one)) == 6


async def test_what_one_tenant_keeps_another_does_not_find(make) -> None:
    door = make(api_keys={"ann": "first-key", "bob": "second-key"})
    ann, bob = ({"authorization": f"Bearer {key}"} for key in ("first-key", "second-key"))
    answer = await door.ask(
        "POST", "/v1/completions", BODY, headers={**ann, "idempotency-key": "k"}
    )
    path = f"/v1/streams/{id_of(answer)}"
    assert (await door.ask("GET", path, headers=ann)).text() == PROMPT
    check_error(await door.ask("GET", path, headers=bob), 404, "request_not_found", None)
    check_error(await door.ask("GET", path), 401, "invalid_api_key", None)
    await door.ask("POST", "/v1/completions", BODY, headers={**bob, "idempotency-key": "k"})
    assert len(door.backend.submissions) == 2


async def test_a_failure_is_told_to_all_readers_and_not_kept(make) -> None:
    door = make(backend=EchoBackend(hold_at=0, failure=QueueFull("full"), fail_at=0))
    calls = [post(door, "k") for _ in range(3)]
    await door.backend.until(lambda: door.backend.num_open == 1, "the production")
    door.backend.release.set()
    for call in calls:
        check_error(await call.done(), 429, "queue_full", None)
    door.backend.failure, door.backend.fail_at = None, -1
    assert (await post(door, "k").done()).text() == PROMPT


async def test_a_failure_in_the_middle_ends_the_stream_of_every_reader(make) -> None:
    door = make(backend=EchoBackend(failure=QueueFull("full"), fail_at=3))
    answer = await post(door, "k").done()
    assert answer.text() == "abc"
    assert answer.events[-1]["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/streams/cmpl-none", 404, "request_not_found"),
        ("/v1/streams/ID?starting_after=10", 416, "position_beyond_end"),
        ("/v1/streams/ID?starting_after=-1", 400, "invalid_value"),
        ("/v1/streams/ID?starting_after=1e3", 400, "invalid_value"),
    ],
)
async def test_bad_places_are_refused(make, path: str, status: int, code: str) -> None:
    door = make()
    request_id = id_of(await post(door, "k").done())
    param = "starting_after" if status == 400 else None
    check_error(await door.ask("GET", path.replace("ID", request_id)), status, code, param)


async def test_another_body_under_the_same_key_is_a_conflict(make) -> None:
    door = make()
    await post(door, "k").done()
    answer = await post(door, "k", {**BODY, "prompt": "other"}).done()
    check_error(answer, 409, "idempotency_conflict", None)
    check_error(await post(door, "x" * 256).done(), 400, "invalid_value", "idempotency-key")


@pytest.mark.parametrize("kept", [{}, {"idempotency-key": "k"}])
@pytest.mark.parametrize("stream", [False, True])
async def test_who_asks_is_told_why_a_request_is_served_where_it_is(make, kept, stream) -> None:
    door = make()
    for asked in ({}, {"x-xllm-explain": "1"}):
        body = {**BODY, "stream": stream}
        call = door.call("POST", "/v1/completions", body, headers={**kept, **asked})
        answer = await call.done()
        told = answer.headers.get("x-xllm-route", "")
        assert told == (f"echo of {_id(answer, stream)}" if asked else "")


def _id(answer: object, stream: bool) -> str:
    return id_of(answer) if stream else str(answer.json()["id"])  # type: ignore[attr-defined]


# ---- the table alone ----


def test_what_is_done_is_forgotten_and_what_nobody_reads_is_given_up() -> None:
    clock = HandClock()
    table = KeptAnswers(clock)
    kept, fresh = table.open("", "k", "/p", b"{}")
    assert fresh
    table.seat(kept, 1)
    kept.request_id = "r"
    clock.turn(10 * KEEP_S)
    assert table.find("", "r") is kept  # somebody reads
    table.seat(kept, -1)
    clock.turn(KEEP_S - 1)
    assert table.open("", "k", "/p", b"{}") == (kept, False)
    clock.turn(2)
    assert table.find("", "r") is None
    assert len(table) == 0


def test_keys_are_bounded_and_tied_to_path_and_body() -> None:
    table = KeptAnswers(HandClock())
    kept, _ = table.open("t", "k" * MOST_KEY, "/p", b"{}")
    with pytest.raises(IdempotencyConflict):
        table.open("t", "k" * MOST_KEY, "/q", b"{}")
    with pytest.raises(InvalidValue):
        table.open("t", "a\nb", "/p", b"{}")
    assert table.open("u", "k" * MOST_KEY, "/q", b"{}")[0] is not kept


# ---- at another master


ASKED = json.dumps(BODY).encode()


def told(said: tuple[int, ...], tenant: str = "") -> Told:
    """What instances know when the other master has said these tokens."""
    return Told(ids=said, origin=Origin(tenant, "k", "/v1/completions", ASKED).packed())


async def test_every_master_gives_an_answer_the_same_id_and_computes_it_under_its_own_name(
    make,
) -> None:
    one, other = make(), make()
    first, second = await post(one, "k").done(), await post(other, "k").done()
    assert id_of(first) == id_of(second) != id_of(await post(one, "l").done())
    (mine,), (theirs,) = one.backend.submissions[:1], other.backend.submissions
    assert mine.stream_id == theirs.stream_id == id_of(first)
    assert mine.request_id != theirs.request_id
    assert unpacked(mine.origin) == Origin("", "k", "/v1/completions", ASKED)


async def test_the_rest_of_a_stream_comes_from_a_master_that_has_only_its_id(make) -> None:
    one, other = make(), make()
    whole = await post(one, "k").done()
    other.backend.known[id_of(whole)] = told(one.backend.submissions[0].prompt_ids[:4])
    rest = await other.ask("GET", f"/v1/streams/{id_of(whole)}?starting_after=2")
    assert rest.status == 200
    assert rest.text() == PROMPT[3:]
    assert whole.body.endswith(rest.body)
    assert other.backend.num_tokens == len(PROMPT) - 4  # what was said is not computed again


@pytest.mark.parametrize(
    "known", [None, Told(), Told(origin=b"\xff"), told((4,), tenant="somebody")]
)
async def test_a_stream_of_somebody_else_or_of_nobody_is_not_found(
    make, known: Told | None
) -> None:
    door = make()
    if known is not None:
        door.backend.known["cmpl-1"] = known
    answer = await door.ask("GET", "/v1/streams/cmpl-1")
    check_error(answer, 404, "request_not_found", None)
    assert door.backend.submissions == []


@pytest.mark.parametrize(
    ("headers", "asks"),
    [
        ({}, False),
        ({"x_stainless_retry_count": "0"}, False),
        ({"x_stainless_retry_count": "1"}, True),
        ({"last_event_id": "cmpl-1:0:3"}, True),
    ],
)
async def test_instances_are_asked_only_for_what_was_asked_before(
    make, headers: dict[str, str], asks: bool
) -> None:
    door = make()
    answer = await post(door, "k", **headers).done()
    assert door.backend.recalled == ([answer_id(door)] if asks else [])
    assert answer.text() == (PROMPT[4:] if "last_event_id" in headers else PROMPT)


def answer_id(door: Door) -> str:
    return door.backend.submissions[0].stream_id


async def test_a_request_with_several_prompts_is_made_anew(make) -> None:
    door = make()
    body = {**BODY, "prompt": ["ab", "cd"]}
    await post(door, "k", body, x_stainless_retry_count="1").done()
    names = [each.stream_id for each in door.backend.submissions]
    assert names == [names[0], f"{names[0]}-1"]
    assert [bool(each.origin) for each in door.backend.submissions] == [True, False]
    assert door.backend.recalled == []


def test_what_was_asked_goes_along_unless_it_is_long() -> None:
    assert Origin("", "k", "/v1/completions", bytes(MAX_ORIGIN)).packed() == b""


@pytest.mark.parametrize(
    ("event_id", "after", "place"),
    [(None, None, None), ("cmpl-1:2:33", None, (2, 33)), (None, "7", (0, 7))],
)
def test_places(event_id: str | None, after: str | None, place: object) -> None:
    assert place_after(event_id, after) == place
