"""The small rooms of the ground floor: clock, ids, metrics, and what systemd is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_py.base import ids
from xllm_py.base.clock import HandClock, RealClock
from xllm_py.base.metrics import CONTENT_TYPE, SECONDS, Metrics
from xllm_py.base.notify import feed_watchdog, notify, watchdog_interval_s

# ---- clock ----


def test_a_hand_clock_stands_still_until_it_is_turned_and_never_turns_back() -> None:
    clock = HandClock(5.0)
    assert (clock.now(), clock.now(), clock.wall()) == (5.0, 5.0, 5.0)
    assert clock.turn(0.5) == clock.now() == 5.5
    with pytest.raises(ValueError, match="does not turn back"):
        clock.turn(-0.1)
    assert clock.now() == 5.5


def test_the_real_clock_does_not_go_back_and_its_wall_is_of_this_century() -> None:
    clock = RealClock()
    seen = [clock.now() for _ in range(1000)]
    assert seen == sorted(seen)
    assert 946_684_800 < clock.wall() < 4_102_444_800


# ---- ids ----


def test_ids_do_not_repeat() -> None:
    assert len({ids.request_id("cmpl") for _ in range(1000)}) == 1000
    assert len({ids.incarnation_id() for _ in range(1000)}) == 1000
    assert len({ids.grant_id() for _ in range(1000)}) == 1000


def test_ids_have_their_shapes() -> None:
    assert ids.request_id("chatcmpl").startswith("chatcmpl-")
    assert len(bytes.fromhex(ids.incarnation_id())) == 16
    assert len(ids.grant_id()) == 16
    assert all(0 <= ids.seed() < 2**63 for _ in range(1000))


@pytest.mark.parametrize("label", ["a", "A-b_c.d:9", "x" * 128])
def test_a_harmless_label_is_kept(label: str) -> None:
    assert ids.label_or_new(label, "req") == label


@pytest.mark.parametrize(
    "label", [None, "", "x" * 129, "a b", "a\n", "a\r\nx: y", "ä", "a/b", "<b>", "a\x00"]
)
def test_any_other_label_is_replaced(label: str | None) -> None:
    made = ids.label_or_new(label, "req")
    assert made.startswith("req-")
    assert made != label


# ---- metrics ----


def test_metrics_have_the_prefix_their_labels_and_their_values() -> None:
    metrics = Metrics()
    counter = metrics.counter("requests", "Requests", ["code"])
    counter.labels(code="200").inc()
    counter.labels(code="200").inc(2)
    metrics.gauge("running", "Running").set(7)
    metrics.seconds("step_seconds", "A step").observe(0.02)
    lines = metrics.text().decode().splitlines()
    assert 'xllm_requests_total{code="200"} 3.0' in lines
    assert "xllm_running 7.0" in lines
    assert 'xllm_step_seconds_bucket{le="0.01"} 0.0' in lines
    assert 'xllm_step_seconds_bucket{le="0.03"} 1.0' in lines
    assert "xllm_step_seconds_count 1.0" in lines
    assert sorted(SECONDS) == list(SECONDS)
    assert CONTENT_TYPE.startswith("text/plain")


def test_two_sets_of_metrics_do_not_see_each_other_and_a_name_is_taken_once() -> None:
    one, two = Metrics(), Metrics()
    one.gauge("x", "X").set(1)
    two.gauge("x", "X").set(2)
    assert b"xllm_x 1.0" in one.text()
    with pytest.raises(ValueError, match="Duplicated"):
        one.gauge("x", "X")


# ---- systemd ----


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "s") if request.param == "path" else f"@xllm-{ids.incarnation_id()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        inbox.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield inbox


def test_words_arrive_in_one_datagram(listener: socket.socket) -> None:
    notify("READY=1", "STATUS=serving")
    assert listener.recv(1000) == b"READY=1\nSTATUS=serving"


def test_nobody_to_tell_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


async def test_the_watchdog_is_fed_while_the_daemon_moves(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    moves = [True, True, False]
    listener.setblocking(False)

    def alive() -> bool:
        if not moves:
            raise EOFError  # the end of the test
        return moves.pop(0)

    with pytest.raises(EOFError):
        await feed_watchdog(alive)
    assert [listener.recv(1000) for _ in range(2)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        listener.recv(1000)


async def test_a_watchdog_nobody_wants_is_not_fed(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await feed_watchdog(lambda: True)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(1000)


@pytest.mark.parametrize(
    ("word", "seconds"), [("3000000", 1.5), ("", 0.0), ("soon", 0.0), ("-5", 0.0)]
)
def test_a_sign_of_life_is_due_twice_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, word: str, seconds: float
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", word)
    assert watchdog_interval_s() == seconds
