"""How long a connection is tried for."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest

from tests.ports import free_port
from xllm_py.base.clock import HandClock
from xllm_py.transport import tcp_handshake
from xllm_py.transport.tcp_handshake import REOPEN_S, GiverEnd, Way
from xllm_py.transport.tcp_socket import LinkBroken


def shake(_: socket.socket) -> NoReturn:
    raise AssertionError("nobody listens")


def dial(clock: HandClock, pauses: list[float], *, slow_s: float = 0.0, most: int = 99) -> GiverEnd:
    """To a port where nobody listens. slow_s: what each try takes; most: pauses before nobody waits any more."""

    def pause(wait_s: float) -> bool:
        pauses.append(wait_s)
        clock.turn(wait_s + slow_s)
        return len(pauses) < most

    return tcp_handshake.dial(
        Way(endpoint=f"127.0.0.1:{free_port()}", tls=None, fabric=None, shared=""),
        shake,
        clock=clock,
        hold=lambda _: None,
        pause=pause,
        again=False,
    )


def test_a_connection_is_tried_until_its_time_is_over_at_growing_distances() -> None:
    pauses: list[float] = []
    with pytest.raises(LinkBroken, match="refused"):
        dial(HandClock(), pauses)
    assert sum(pauses) == pytest.approx(REOPEN_S)
    assert pauses[:-1] == sorted(pauses[:-1])


def test_a_try_that_takes_all_the_time_is_followed_by_one_more() -> None:
    pauses: list[float] = []
    with pytest.raises(LinkBroken):
        dial(HandClock(), pauses, slow_s=2 * REOPEN_S)
    assert len(pauses) == 1


def test_what_nobody_waits_for_is_not_tried_again() -> None:
    pauses: list[float] = []
    with pytest.raises(LinkBroken):
        dial(HandClock(), pauses, most=2)
    assert len(pauses) == 2
