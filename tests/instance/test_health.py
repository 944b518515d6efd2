"""Whether an instance can serve, and what it remembers of the requests it served."""

from __future__ import annotations

from xllm_py.base.clock import HandClock
from xllm_py.instance.health import Health
from xllm_py.instance.records import Records
from xllm_py.wire.messages import Progress


class FakeEngine:
    down = ""
    progress = Progress()
    progress_at = 0.0


def test_the_reasons_of_ready_in_their_order() -> None:
    clock, engine = HandClock(), FakeEngine()
    health = Health(engine, clock, 3.0)  # type: ignore[arg-type]  # a fake
    engine.progress_at = clock.now()

    def reasons() -> tuple[str, ...]:
        answer = health.readiness()
        assert answer.ready == (not answer.reasons)
        return answer.reasons

    assert reasons() == ("loading",)
    health.loaded = True
    assert reasons() == ()
    clock.turn(100)
    assert reasons() == ()  # an idle engine may be silent
    engine.progress = Progress(waiting=1)
    engine.progress_at = clock.now()
    clock.turn(2.9)
    assert reasons() == ()
    clock.turn(0.2)
    assert reasons() == ("engine_stalled",)
    engine.progress = Progress(running=1, announced_s=5.0)
    assert reasons() == ()  # it said that its step takes long
    clock.turn(15.1)
    assert reasons() == ("engine_stalled",)
    engine.progress = Progress()
    health.draining = True
    assert reasons() == ("draining",)
    engine.down = "killed"
    assert reasons() == ("engine_down",)
    assert "killed" in health.readiness().details


def test_records_are_bounded_in_number_and_age() -> None:
    clock = HandClock()
    records = Records(clock)
    assert records.get("unknown") is None
    for number in range(1001):
        records.put(f"r{number}", "finished", {"received": 0.0})
    assert records.get("r0") is None
    assert records.get("r1") is not None
    clock.turn(601)
    records.put("new", "finished", {})
    assert records.get("r1000") is None
    assert records.get("new") is not None
