"""What benchmarks/front_door makes of a stream: when text came, how much, and whether it was what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.front_door import figures_of, ratios
from benchmarks.http_stream import Answer, Stream, read_answer
from benchmarks.load import Round, Workload
from benchmarks.report import percentile

WORKLOAD = Workload(prompt_tokens=4, output_tokens=3, seed=0)
EVENTS = [
    b'id: cmpl:0:0\ndata: {"choices":[{"text":"a"}],"usage":null}\n\n',
    b": still here\n\n",
    b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n',
    b'data: {"choices":[{"text":"c"}]}\n\n',
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n',
    b"data: [DONE]\n\n",
]


def stream_of(pieces: Sequence[bytes], status: int = 200) -> Stream:
    """Sent at 10, a piece each second from 11 on."""
    timed = [(11.0 + index, piece) for index, piece in enumerate(pieces)]
    return Stream(sent_at=10.0, ended_at=10.0 + len(pieces), status=status, pieces=timed)


def test_times_are_those_of_the_events_with_text() -> None:
    answer = read_answer(stream_of(EVENTS))
    assert WORKLOAD.fault(answer) == ""
    assert answer.text_at == [11.0, 13.0, 14.0]
    assert (answer.ttft, answer.tpot, answer.gaps, answer.e2e) == (1.0, 1.5, [2.0, 1.0], 7.0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_an_event_counts_when_its_last_byte_came(size: int) -> None:
    whole = b"".join(EVENTS)
    answer = read_answer(stream_of([whole[i : i + size] for i in range(0, len(whole), size)]))
    assert WORKLOAD.fault(answer) == ""
    end_of_first = 11.0 + (len(EVENTS[0]) - 1) // size
    assert answer.text_at[0] == end_of_first


@pytest.mark.parametrize(
    ("pieces", "status", "fault"),
    [
        (EVENTS[:-1], 200, "did not end with [DONE]"),
        ([*EVENTS[:5], EVENTS[6]], 200, "0 tokens instead of 3"),
        ([EVENTS[0], b'data: {"error":{"code":"overloaded"}}\n\n'], 200, "overloaded"),
        ([b'{"error":{"code":"no_instances"}}'], 503, "503: "),
        (EVENTS[3:], 200, ""),
        (EVENTS[4:], 200, "no text came"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_a_fault(
    pieces: list[bytes], status: int, fault: str
) -> None:
    found = WORKLOAD.fault(read_answer(stream_of(pieces, status)))
    assert fault in found
    assert bool(found) == bool(fault)


def test_requests_are_repeatable_and_no_two_are_alike() -> None:
    first, second, again = (WORKLOAD.prompt(number) for number in (1, 2, 1))
    assert first == again != second
    assert len(first) == WORKLOAD.prompt_tokens


def round_of(seconds: float) -> Round:
    """One answer with so many seconds between its three tokens."""
    at = [1.0 + index * seconds for index in range(3)]
    return Round([Answer(0.0, at[-1], at, 3, True, "")], at[-1])


def test_a_row_tells_rates_and_percentiles_and_the_ratio_is_taken_by_round() -> None:
    ours, theirs = [round_of(1.0), round_of(3.0)], [round_of(0.5), round_of(1.0)]
    figures = figures_of(ours)
    assert figures["requests"] == 2
    assert figures["tpot_ms"] == {"mean": 2000.0, "p50": 1000.0, "p90": 3000.0, "p99": 3000.0}
    assert figures["tokens_s"]["max"] == 1.0
    found = ratios(ours, theirs)
    assert (found["tpot"]["min"], found["tpot"]["max"], found["ttft"]["median"]) == (2.0, 3.0, 1.0)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 5), (0.51, 6), (0.9, 9), (0.99, 10), (1.0, 10)]
)
def test_a_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], share) == expected
