"""When P asks D: before it computes the step that the request was admitted to, so that D answers while P computes."""

from __future__ import annotations

from tests.engine.pair import Pair
from tests.engine.test_handoff_agent import ask
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.wire import messages as m


class Watch:
    """Wraps an executor: which offers had left when a step began to compute?"""

    def __init__(self, pair: Pair) -> None:
        self.offered: list[list[str]] = []
        self._execute = pair.p.executor.execute
        self._events = pair.p.events

    def execute(self, plan: StepPlan, layer_done: object = None) -> StepResult:
        sent = [event for event in self._events if isinstance(event, m.OffersOut)]
        self.offered.append([o.submission.request_id for event in sent for o in event.offers])
        return self._execute(plan, layer_done)


def test_an_offer_leaves_before_the_prompt_is_computed() -> None:
    pair = Pair()
    watch = Watch(pair)
    pair.p.executor.execute = watch.execute  # type: ignore[method-assign]
    pair.submit(ask("a", length=10))
    pair.submit(ask("b", length=10))
    pair.turn()
    assert watch.offered == [["a", "b"]]
    pair.settle()
    pair.assert_empty()


def test_every_offer_leaves_once() -> None:
    pair = Pair(p={"max_tokens_per_chunk": 4})
    watch = Watch(pair)
    pair.p.executor.execute = watch.execute  # type: ignore[method-assign]
    pair.submit(ask("a", length=20))
    pair.settle()
    assert [names for names in watch.offered if names] == [["a"]]
    pair.assert_empty()
