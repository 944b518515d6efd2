"""A look at a KV link is answered once, whatever the link does."""

from __future__ import annotations

import pytest

from tests.conformance.kv_pair import Pair, memory_maker
from xllm_py.base.clock import HandClock
from xllm_py.engine.probing import LARGE_BYTES, ProbingAgent
from xllm_py.transport.memory import ACK_S, Faults, MemoryKvTransport, MemoryNetwork
from xllm_py.wire import messages as m


class Rig:
    """P looks at D; the network is in memory and its clock turned by hand."""

    def __init__(self, faults: Faults) -> None:
        self.clock = HandClock()
        self.network = MemoryNetwork(self.clock, lambda _giver, _taker: faults)
        self.pair = Pair(self.make)
        self.said: list[m.Event] = []
        self.agent = ProbingAgent(transport=self.pair.giver, send=self.said.append)

    def make(self, **made: object) -> MemoryKvTransport:
        key = b"k" * 32
        return MemoryKvTransport(network=self.network, cluster_key=key, **made)  # type: ignore[arg-type]

    def look(self, incarnation: str = "d-1") -> None:
        endpoint = self.pair.taker.endpoint
        self.agent.on_probe(
            m.Probe(call=7, block_size=4, endpoints=(endpoint,), incarnation=incarnation), 0.0
        )
        for _ in range(4):
            self.pair.taker.poll()
            for event in self.pair.giver.poll():
                assert self.agent.on_transport(event)
            self.clock.turn(0.01)

    def close(self) -> None:
        self.pair.close()


def test_a_link_that_works_has_a_round_trip_and_a_rate() -> None:
    rig = Rig(Faults(delay_s=0.01))
    rig.look()
    (said,) = rig.said
    assert isinstance(said, m.Probed)
    assert (said.call, said.works) == (7, True)
    assert said.round_trip_s == pytest.approx(0.01)
    assert said.bytes_per_s >= LARGE_BYTES
    assert rig.agent.num_open == 0
    rig.close()


@pytest.mark.parametrize("incarnation", ["d-0", "d-1"])
def test_a_link_that_does_not_has_a_reason(incarnation: str) -> None:
    rig = Rig(Faults(cut_at_byte=200) if incarnation == "d-1" else Faults())
    rig.look(incarnation)
    (said,) = rig.said
    assert isinstance(said, m.Probed)
    assert not said.works
    assert said.reason
    assert rig.agent.num_open == 0
    rig.close()


def test_a_link_that_is_silent_has_one_too() -> None:
    rig = Rig(Faults(lose_frames=frozenset({0})))
    rig.look()
    assert rig.said == []
    rig.clock.turn(ACK_S + 1)
    for event in rig.pair.giver.poll():
        rig.agent.on_transport(event)
    (said,) = rig.said
    assert isinstance(said, m.Probed)
    assert "acknowledge" in said.reason
    rig.close()


def test_an_engine_without_a_kv_port_says_so() -> None:
    said: list[m.Event] = []
    agent = ProbingAgent(transport=None, send=said.append)
    agent.on_probe(m.Probe(call=1, block_size=4, endpoints=("x:1",), incarnation="d"), 0.0)
    assert said == [m.Probed(call=1, reason="this instance has no KV port")]


def test_events_of_others_are_left_to_them() -> None:
    pair = Pair(memory_maker())
    agent = ProbingAgent(transport=pair.giver, send=lambda _event: None)
    grant = pair.grant((1,))
    pair.give(grant, (2,))
    pair.turn()
    assert pair.given
    assert not any(agent.on_transport(event) for event in pair.given)
    pair.close()
