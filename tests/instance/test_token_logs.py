"""What an instance said of requests that may go on at another master: by position, until a while after their end."""

from __future__ import annotations

from typing import Any

import pytest

from tests.instance.support import outputs, submission
from xllm_py.base.clock import HandClock
from xllm_py.core.request import FirstToken
from xllm_py.instance.outlets import Destination, Outlets
from xllm_py.instance.token_logs import KEEP_S, MOST_BYTES, MOST_KEPT, UNKNOWN, TokenLogs, as_json

MASTER = Destination("master:1")


class House:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.logs = TokenLogs(self.clock)
        self.outlets = Outlets(lambda *_: None, self.logs)

    def open(self, name: str = "r", **fields: Any) -> None:
        order = submission(name, **{"stream_id": "s", "attempt": 1, **fields})
        self.outlets.open_remote(order, MASTER)

    def ids(self, stream_id: str = "s") -> list[int] | None:
        log = self.logs.find(stream_id)
        return None if log is None else log.ids


@pytest.fixture
def house() -> House:
    return House()


def test_tokens_lie_at_their_positions_behind_those_of_earlier_attempts(house: House) -> None:
    house.open(generated_ids=(7, 8), origin=b"asked")
    house.outlets.on_outputs(outputs(("r", 3, 40)))
    assert house.ids() == [7, 8, UNKNOWN, 40]
    first = FirstToken(request_id="r", attempt=1, grant=b"", token_ids=(30,))
    for _ in range(2):  # it may be told twice
        house.outlets.on_first(first)
    house.outlets.on_outputs(outputs(("r", 4, 50), ("r", 5, -1, "stop")))
    assert house.ids() == [7, 8, 30, 40, 50]
    assert as_json(house.logs.find("s")) == {"ids": [7, 8, 30, 40, 50], "origin": "YXNrZWQ="}


def test_it_is_kept_for_a_while_after_the_end_and_not_longer(house: House) -> None:
    house.open()
    house.clock.turn(10 * KEEP_S)
    house.outlets.on_outputs(outputs(("r", 0, 1, "length")))
    house.clock.turn(KEEP_S - 1)
    assert house.ids() == [1]
    house.clock.turn(2)
    assert house.ids() is None
    assert as_json(None) == {}


def test_what_was_cancelled_is_kept_as_long(house: House) -> None:
    house.open()
    house.outlets.on_outputs(outputs(("r", 0, 1)))
    house.outlets.close("r", 1)
    assert house.ids() == [1]
    house.clock.turn(KEEP_S + 1)
    assert house.ids() is None


def test_a_later_attempt_takes_the_place_of_an_earlier_one(house: House) -> None:
    house.open()
    house.outlets.on_outputs(outputs(("r", 0, 1), ("r", 1, 2)))
    house.open(attempt=2, generated_ids=(1,))
    assert house.ids() == [1]


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_id": ""},
        {"best_of": 2},
        {"logprobs": 0},
    ],
    ids=["no id", "choices", "logprobs"],
)
def test_of_what_another_master_could_not_go_on_with_nothing_is_kept(
    house: House, fields: dict[str, Any]
) -> None:
    house.open(**fields)
    house.outlets.on_outputs(outputs(("r", 0, 1)))
    assert house.ids() is None


def test_the_oldest_make_room(house: House) -> None:
    for number in range(MOST_KEPT + 2):
        house.open(f"r{number}", stream_id=f"s{number}")
    assert house.ids("s0") is None
    assert house.ids(f"s{MOST_KEPT + 1}") == []


def test_what_was_asked_is_bounded_in_bytes(house: House) -> None:
    asked = bytes(MOST_BYTES // 4)
    for turn in range(3):  # again under the same ids: each counts once
        for number in range(4):
            house.open(f"r{number}", stream_id=f"s{number}", attempt=turn + 1, origin=asked)
    assert [house.ids(f"s{number}") for number in range(4)] == [[]] * 4
    house.open("r4", stream_id="s4", origin=b"one more")
    assert house.ids("s0") is None
    assert house.ids("s1") == house.ids("s4") == []
