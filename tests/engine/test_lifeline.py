"""A connection that ends is a process that is gone."""

from __future__ import annotations

import queue
import socket
import struct

import pytest

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.engine import lifeline

WAIT_S = 10.0


def test_who_lets_go_is_told_by_number_and_nobody_else() -> None:
    lost: queue.Queue[int] = queue.Queue()
    lines = lifeline.Lifelines("127.0.0.1", lost.put)
    ends = {
        rank: lifeline.hold(("127.0.0.1", lines.port), rank, lambda: None) for rank in (1, 2, 3)
    }
    ends[2].shutdown(socket.SHUT_RDWR)
    assert lost.get(timeout=WAIT_S) == 2
    assert lost.empty()
    lines.close()
    ends[1].close()
    assert lost.empty()


def test_a_reset_is_an_end_too() -> None:
    lost: queue.Queue[int] = queue.Queue()
    lines = lifeline.Lifelines("127.0.0.1", lost.put)
    with socket.create_connection(("127.0.0.1", lines.port)) as end:
        end.sendall(struct.pack("<I", 7))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert lost.get(timeout=WAIT_S) == 7
    lines.close()


def test_a_stranger_who_says_nothing_is_nobodys_loss() -> None:
    lost: queue.Queue[int] = queue.Queue()
    lines = lifeline.Lifelines("127.0.0.1", lost.put)
    socket.create_connection(("127.0.0.1", lines.port)).close()
    end = lifeline.hold(("127.0.0.1", lines.port), 1, lambda: None)
    end.shutdown(socket.SHUT_RDWR)
    assert lost.get(timeout=WAIT_S) == 1
    lines.close()


@pytest.mark.parametrize("how", ["close", "vanish"])
def test_the_others_hear_of_rank_0s_end(how: str) -> None:
    heard: queue.Queue[str] = queue.Queue()
    if how == "close":
        lines = lifeline.Lifelines("127.0.0.1", lambda rank: None)
        lifeline.hold(("127.0.0.1", lines.port), 1, lambda: heard.put("gone"))
        # it counts once it has said who it is
        lifeline_is_known = lifeline.hold(("127.0.0.1", lines.port), 2, lambda: heard.put("gone"))
        assert lifeline_is_known
        while len(lines._ends) < 2:
            pass
        lines.close()
        assert [heard.get(timeout=WAIT_S) for _ in range(2)] == ["gone"] * 2
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lifeline.hold(listener.getsockname()[:2], 1, lambda: heard.put("gone"))
        listener.accept()[0].close()
    assert heard.get(timeout=WAIT_S) == "gone"


def test_a_rank_that_cannot_reach_rank_0_says_where() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        DeviceUnavailable, match=f"rank 3 met rank 0 but cannot reach it at 127.0.0.1:{port}"
    ):
        lifeline.hold(("127.0.0.1", port), 3, lambda: None)
