"""D's answer comes while P computes the step: layers that are stored leave at once, the others as they are computed."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.core.toy_rig import expected, submission
from tests.engine.pair import Pair
from xllm_py.base.clock import HandClock
from xllm_py.base.errors import PeerUnavailable
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.engine.loop import EngineLoop
from xllm_py.engine.toy import ToyExecutor
from xllm_py.transport.pipe import ApiPipe, EnginePipe
from xllm_py.wire import messages as m

LAYERS = 2


def post_in_step(pair: Pair, at_layer: int) -> list[int]:
    """Deliver P's post behind one layer of each of its steps; returns what P had sent behind each layer of the last step."""
    execute, sent = pair.p.executor.execute, []

    def interrupted(plan: StepPlan, layer_done: Callable[[int], None] | None = None) -> StepResult:
        def stored(layer: int) -> None:
            assert layer_done is not None
            layer_done(layer)
            if layer == at_layer:
                events, pair.p.events[:] = list(pair.p.events), []
                for event in events:
                    pair._on_event(pair.p, event)
                pair._deliver()
            sent.append(pair.p.transport.ledger()["bytes_sent"])

        sent.clear()
        return execute(plan, stored)

    pair.p.executor.execute = interrupted  # type: ignore[method-assign]  # the fake API process sits in the step
    return sent


@pytest.mark.parametrize("at_layer", range(LAYERS))
@pytest.mark.parametrize("chunk", [3, 4, 7, 100])
@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_an_answer_in_mid_step_changes_nothing_in_the_text(
    at_layer: int, chunk: int, length: int
) -> None:
    pair = Pair(p={"max_tokens_per_chunk": chunk})
    post_in_step(pair, at_layer)
    one = submission("a", list(range(length)), 12, give=True, ignore_eos=True)
    pair.submit(one)
    pair.settle()
    assert pair.text("a") == expected(one)[0]
    assert pair.verdicts == {"a": ["landed"]}
    pair.assert_empty()


def test_kv_of_a_prompt_of_one_step_leaves_before_the_step_ends() -> None:
    pair = Pair()
    sent = post_in_step(pair, at_layer=0)
    pair.submit(submission("a", list(range(16)), 4, give=True, ignore_eos=True))
    pair.p.turn()
    pair.p.transport.poll()
    block_bytes = pair.p.executor.kv_memory().layout.block_bytes
    assert pair.p.transport.ledger()["bytes_sent"] >= LAYERS * 2 * 4 * block_bytes
    assert len(sent) == LAYERS


def test_a_refusal_in_mid_step_leaves_the_request_on_p() -> None:
    pair = Pair(d={"num_blocks": 3})
    post_in_step(pair, at_layer=0)
    one = submission("a", list(range(10)), 12, give=True, ignore_eos=True)
    pair.submit(one)
    pair.settle()
    assert pair.text("a") == expected(one)[0]
    assert pair.verdicts == {"a": ["refused"]}
    pair.assert_empty()


class Asking:
    """An executor that lets the test act behind a layer."""

    def __init__(self, inner: ToyExecutor, behind: Callable[[], None]) -> None:
        self._inner = inner
        self._behind = behind

    def execute(
        self, plan: StepPlan, layer_done: Callable[[int], None] | None = None
    ) -> StepResult:
        self._behind()
        return self._inner.execute(plan, layer_done)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def make_loop(pair: Pair, behind: Callable[[], None]) -> tuple[EngineLoop, socket.socket]:
    """P's engine as a real loop over a real pipe; returns the API process's end too."""
    ours, theirs = socket.socketpair()
    loop = EngineLoop(
        scheduler=pair.p.scheduler,
        executor=Asking(pair.p.executor, behind),  # type: ignore[arg-type]  # the rest is the toy's
        agent=pair.p.agent,
        pipe=EnginePipe(ours),
        clock=HandClock(),
    )
    return loop, theirs


async def test_other_commands_wait_for_the_end_of_the_step() -> None:
    pair = Pair()
    abort = m.Abort(request_ids=["a"], attempts=[0])
    loop, theirs = make_loop(pair, lambda: api.send(abort))
    api = await ApiPipe.open(theirs)
    pair.submit(submission("a", list(range(10)), 12, give=True, ignore_eos=True))
    loop.turn(0.0)
    assert pair.p.scheduler.ledger()["requests_giving"] == 1
    loop.turn(0.0)
    assert pair.p.scheduler.ledger()["requests_open"] == 0
    await api.close()


def test_a_pipe_that_ends_in_mid_step_is_no_failure_of_the_executor() -> None:
    pair = Pair()
    loop, api = make_loop(pair, lambda: api.close())
    pair.submit(submission("a", list(range(10)), 12, give=True, ignore_eos=True))
    with pytest.raises(PeerUnavailable):
        loop.turn(0.0)
