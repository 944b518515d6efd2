"""Every open request has one outlet; outputs reach it whole, in order, and nobody else."""

from __future__ import annotations

import pytest

from tests.instance.support import outputs, submission
from xllm_py.base.errors import EngineDown, QueueFull
from xllm_py.core.plan import Outputs
from xllm_py.instance.outlets import Destination, Outlets, copy_entry
from xllm_py.openai.backend import Delta
from xllm_py.wire import messages as m

ONE, TWO = Destination("one:1"), Destination("two:1")


class Sent:
    """Outlets, and what they sent away."""

    def __init__(self) -> None:
        self.sent: list[tuple[Destination, Outputs]] = []
        self.outlets = Outlets(lambda to, column: self.sent.append((to, column)))


@pytest.fixture
def box() -> Sent:
    return Sent()


def test_one_step_is_one_message_per_destination_in_the_steps_order(box: Sent) -> None:
    for name, to in (("a", ONE), ("b", TWO), ("c", ONE)):
        box.outlets.open_remote(submission(name, attempt=1), to)
    box.outlets.on_outputs(outputs(("c", 0, 1), ("b", 4, 2), ("a", 2, 3), ("nobody", 0, 9)))
    assert box.sent == [
        (ONE, outputs(("c", 0, 1), ("a", 2, 3))),
        (TWO, outputs(("b", 4, 2))),
    ]


def test_sparse_columns_follow_their_entry(box: Sent) -> None:
    box.outlets.open_remote(submission("b", attempt=1), ONE)
    step = outputs(("gone", 0, 1), ("b", 3, -1, "deadline_exceeded"))
    step.messages.update({0: "not ours", 1: "late"})
    step.cached_tokens.update({0: 1, 1: 32})
    step.journeys.update({0: {"received": 9.0}, 1: {"received": 0.0}})
    box.outlets.on_outputs(step)
    [(_, column)] = box.sent
    assert column.messages == {0: "late"}
    assert column.cached_tokens == {0: 32}
    assert column.journeys == {0: {"received": 0.0}}


def test_copied_entries_are_equal_in_every_column() -> None:
    step = outputs(("a", 1, 2), ("b", 3, 4, "stop"))
    step.messages[1], step.cached_tokens[1], step.journeys[1] = "text", 7, {"finished": 1.0}
    copied = Outputs()
    for index in range(2):
        copy_entry(step, index, copied)
    assert copied == step


def test_a_remote_outlet_ends_with_the_finish(box: Sent) -> None:
    box.outlets.open_remote(submission("a", attempt=1), ONE)
    box.outlets.on_outputs(outputs(("a", 0, 1, "stop"), ("a", 1, 2)))
    assert box.outlets.num_open == 0
    assert box.sent == [(ONE, outputs(("a", 0, 1, "stop")))]


def test_a_closed_request_is_heard_no_more(box: Sent) -> None:
    box.outlets.open_remote(submission("a", attempt=1), ONE)
    local = box.outlets.open_local("b")
    for name in ("a", "b", "unknown"):
        box.outlets.close(name)
    box.outlets.on_outputs(outputs(("a", 0, 1), ("b", 0, 1)))
    assert (box.sent, list(local.deltas), box.outlets.num_open) == ([], [], 0)
    assert not box.outlets.has("a")
    assert box.outlets.destination("a") is None


def test_a_local_outlet_gets_deltas_and_is_rung(box: Sent) -> None:
    local = box.outlets.open_local("a")
    step = outputs(("a", 0, 5), ("a", 1, -1, "length"))
    step.cached_tokens[1] = 16
    step.journeys.update({0: {"received": 0.0}, 1: {"finished": 2.0}})
    box.outlets.on_outputs(step)
    assert list(local.deltas) == [
        Delta(position=0, token_ids=(5,)),
        Delta(position=1, token_ids=(), finish_reason="length", cached_tokens=16),
    ]
    assert local.news.is_set()
    assert local.journey == {"received": 0.0, "finished": 2.0}
    assert (box.sent, box.outlets.num_open) == ([], 1)  # its reader closes it


def test_an_error_comes_after_what_was_said_before_it(box: Sent) -> None:
    local = box.outlets.open_local("a")
    step = outputs(("a", 0, 5), ("a", 1, -1, "queue_full"))
    step.messages[1] = "too many wait"
    box.outlets.on_outputs(step)
    assert [delta.token_ids for delta in local.deltas] == [(5,)]
    assert isinstance(local.error, QueueFull)
    assert local.error.message == "too many wait"


def test_an_abort_nobody_asked_for_is_an_error_too(box: Sent) -> None:
    local = box.outlets.open_local("a")
    box.outlets.on_outputs(outputs(("a", 0, -1, "abort")))
    assert local.error is not None
    assert local.news.is_set()


def test_when_the_engine_is_down_every_local_reader_hears_it(box: Sent) -> None:
    readers = [box.outlets.open_local(name) for name in "ab"]
    box.outlets.open_remote(submission("c", attempt=1), ONE)
    box.outlets.fail_all(EngineDown("it died"))
    assert all(isinstance(reader.error, EngineDown) for reader in readers)
    assert all(reader.news.is_set() for reader in readers)
    assert not box.outlets.has("c")


def test_a_reservation_that_ended_closes_the_outlet_of_its_own_attempt_only(box: Sent) -> None:
    box.outlets.open_remote(submission("a", attempt=1), ONE)
    box.outlets.open_remote(submission("b", attempt=2), ONE)
    box.outlets.on_reservations_ended(
        m.ReservationsEnded(request_ids=["a", "b", "unknown"], attempts=[1, 1, 1])
    )
    assert not box.outlets.has("a")
    assert box.outlets.awaits("b", 2)


def test_what_an_earlier_attempt_still_says_goes_nowhere_and_closes_nothing(box: Sent) -> None:
    box.outlets.open_remote(submission("a", attempt=2), ONE)
    box.outlets.on_outputs(outputs(("a", 0, 5, "abort")))  # of attempt 1
    assert box.sent == []
    assert box.outlets.awaits("a", 1)
    assert not box.outlets.awaits("a", 3)
