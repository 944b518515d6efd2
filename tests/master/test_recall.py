"""A request that another master was asked for: what its instances know is put together, and the answer goes on behind it."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.master.support import running_master, submission, until
from xllm_py.master.recall import Said, together
from xllm_py.openai.backend import Told


def told(*logs: list[int]) -> tuple[int, ...] | None:
    found = together([Said(ids=log) for log in logs])
    return None if found is None else found.ids


@pytest.mark.parametrize(
    ("logs", "ids"),
    [
        ([], None),
        ([[]], ()),
        ([[5]], ()),  # the last one comes again, and with it how the answer ends
        ([[5, 6, 7]], (5, 6)),
        ([[5], [-1, 6, 7]], (5, 6)),
        ([[-1, 6, 7]], ()),
        ([[5, 6], [5, -1, -1, 8]], (5,)),
        ([[5, 6, 7], [5, 9]], ()),
    ],
)
def test_logs_fill_each_others_gaps(logs: list[list[int]], ids: tuple[int, ...] | None) -> None:
    assert told(*logs) == ids


@given(st.lists(st.integers(0, 9), max_size=12), st.data())
def test_however_it_is_spread_nothing_but_the_answer_is_told(
    answer: list[int], data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(answer), max_size=len(answer)))
    logs = [
        [token if owner == who else -1 for token, owner in zip(answer, owners, strict=True)]
        for who in range(3)
    ]
    assert told(*logs) == tuple(answer[:-1])


def test_what_was_asked_and_what_it_was_computed_with_go_along() -> None:
    one, other = Said(ids=[1, 2], numerics="n"), Said(ids=[1], origin=b"asked", numerics="n")
    assert together([one, other]) == Told(ids=(1,), numerics="n", origin=b"asked")
    strange = Said(ids=[], numerics="m")
    assert together([one, strange]) == Told(ids=(1,))
    contradicts = Said(ids=[3], origin=b"asked", numerics="n")
    assert together([one, contradicts]) == Told(origin=b"asked")


def known(ids: Any, origin: bytes = b"") -> dict[str, Any]:
    return {"ids": ids, "origin": base64.b64encode(origin).decode()}


async def test_every_instance_is_asked_and_those_that_say_nothing_sound_are_passed_over() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        assert await master.parts.backend.recall("s") is None
        assert prefill.asked == decode.asked == ["s"]
        prefill.said["s"], decode.said["s"] = known([11], b"asked"), known([-1, 12, 13])
        found = await master.parts.backend.recall("s")
        assert found is not None
        assert (found.ids, found.origin) == ((11, 12), b"asked")
        for nonsense in (known("11"), known([11, "x"]), {"ids": [11], "origin": 3}):
            decode.said["s"] = nonsense
            found = await master.parts.backend.recall("s")
            assert found is not None
            assert found.ids == ()
        decode.said["s"] = {**known([11, 12, 13]), "origin": "no base 64!"}
        found = await master.parts.backend.recall("s")
        assert found is not None
        assert (found.ids, found.origin) == ((11, 12), b"asked")


async def test_a_request_goes_on_behind_what_is_known() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission(), Told(ids=(11, 12)))
        order = (await until("the submission", lambda: prefill.submissions))[0]
        assert (order.attempt, order.generated_ids) == (1, (11, 12))
        assert reader.ids == [11, 12]
        await prefill.say(2, 13)
        await decode.say(3, 14, "length")
        await reader.ended()
        assert reader.error is None
        assert reader.ids == [11, 12, 13, 14]
        assert [delta.position for delta in reader.deltas][:2] == [0, 2]


async def test_another_attempt_of_it_says_nothing_twice() -> None:
    async with running_master() as master:
        prefill, _ = await master.pair()
        reader = master.read(submission(), Told(ids=(11, 12)))
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(2, 13)
        await until("a token", lambda: reader.ids == [11, 12, 13])
        await prefill.say(3, -1, "instance_lost")
        order = (await until("another attempt", lambda: prefill.submissions[1:]))[0]
        assert (order.attempt, order.generated_ids) == (2, (11, 12, 13))
