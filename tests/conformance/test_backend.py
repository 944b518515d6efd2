"""One suite for every backend that computes here: the echo of the door's tests, and an instance's own over a toy engine process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.openai.support import EchoBackend
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import InvalidValue
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.toy import VOCAB_SIZE, ToyExecutor, lone_answer
from xllm_py.instance.engine_link import EngineHandlers, EngineLink
from xllm_py.instance.local_backend import LocalBackend
from xllm_py.instance.outlets import Outlets
from xllm_py.openai.backend import Backend, Delta, Readiness, ServedModel

WAIT_S = 10.0
NUM_BLOCKS = 64
CONFIG = EngineConfig(
    executor="toy",
    toy_num_blocks=NUM_BLOCKS,
    toy_step_s=0.001,
    cache=CacheConfig(block_size=4),
    scheduler=SchedulerConfig(max_seqs_per_batch=4),
    log_level="error",
)
PROMPT = tuple(range(10, 40))


@dataclass(kw_only=True)
class Subject:
    """A backend and what a test has to know of it."""

    backend: Backend
    expected: Callable[[Submission], list[int]]
    open_requests: Callable[[], Any]  # a coroutine: requests and blocks still held anywhere
    spoil: Callable[[Submission], Submission]  # a submission that is refused with InvalidValue

    async def until_empty(self) -> None:
        """Wait until nothing is held."""
        clock = RealClock()
        deadline = clock.now() + WAIT_S
        while held := await self.open_requests():
            assert clock.now() < deadline, f"{held} still held after {WAIT_S} s"
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[Subject]:
    backend = EchoBackend(piece=2)

    async def open_requests() -> int:
        return backend.num_open

    def spoil(given: Submission) -> Submission:
        backend.fail_at, backend.failure = 0, InvalidValue("this prompt is spoiled")
        return given

    yield Subject(
        backend=backend,
        expected=lambda given: list(given.prompt_ids[: given.sampling.max_tokens]),
        open_requests=open_requests,
        spoil=spoil,
    )


def _no_peers(*words: object) -> None:
    raise AssertionError(f"an engine without peers says {words}")


@contextlib.asynccontextmanager
async def local() -> AsyncIterator[Subject]:
    tasks, clock = TaskFamily("backend"), RealClock()
    outlets = Outlets(_no_peers)
    handlers = EngineHandlers(
        on_outputs=outlets.on_outputs,
        on_offers=_no_peers,
        on_first_tokens=_no_peers,
        on_cancels=_no_peers,
        on_verdicts=_no_peers,
        on_reservations_ended=_no_peers,
        on_progress=lambda progress: None,
    )
    link = EngineLink(handlers=handlers, tasks=tasks, clock=clock)
    await link.start(CONFIG, timeout_s=60.0)
    model = ServedModel(name="toy", max_model_len=4096, vocab_size=VOCAB_SIZE, created=1)
    backend = LocalBackend(
        engine=link,
        outlets=outlets,
        models=lambda: (model,),
        ready=lambda: Readiness(ready=not link.down),
        clock=clock,
        on_journey=lambda *_: None,
    )

    async def open_requests() -> int:
        counts = await link.ledger()
        held = NUM_BLOCKS - counts["free"] - counts["cached"]
        return outlets.num_open + counts["requests_open"] + held

    def spoil(given: Submission) -> Submission:
        return order(given.request_id, prompt=(1, VOCAB_SIZE))

    yield Subject(
        backend=backend,
        expected=lambda given: lone_answer(
            ToyExecutor(CONFIG), list(given.prompt_ids), given.sampling.max_tokens
        ),
        open_requests=open_requests,
        spoil=spoil,
    )
    await link.close()
    await tasks.close()


@pytest.fixture(params=[echo, local], ids=lambda kind: kind.__name__)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with request.param() as made:
        yield made
        await made.until_empty()


def order(
    request_id: str = "r", *, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 12
) -> Submission:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0, ignore_eos=True)
    return Submission(request_id=request_id, prompt_ids=prompt, sampling=sampling, timeout_s=WAIT_S)


async def read(subject: Subject, given: Submission, pause: int = 0) -> list[int]:
    """All tokens; positions follow on each other, and only the last delta finishes."""
    tokens: list[int] = []
    deltas: list[Delta] = []
    async with contextlib.aclosing(subject.backend.generate(given)) as source:
        async for delta in source:
            assert delta.position == len(tokens)
            assert delta.choice == 0
            tokens += delta.token_ids
            deltas.append(delta)
            for _ in range(pause):
                await asyncio.sleep(0.001)
    assert [bool(delta.finish_reason) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].finish_reason == "length"
    return tokens


async def test_an_answer_is_whole_in_order_and_ends_once(subject: Subject) -> None:
    given = order()
    assert await read(subject, given) == subject.expected(given)


async def test_one_token_is_a_whole_answer(subject: Subject) -> None:
    given = order(max_tokens=1)
    assert await read(subject, given) == subject.expected(given)


async def test_many_at_once_get_each_their_own(subject: Subject) -> None:
    orders = [order(f"r{n}", prompt=(n, *PROMPT), max_tokens=5 + n % 7) for n in range(20)]
    answers = await asyncio.gather(*(read(subject, given) for given in orders))
    assert answers == [subject.expected(given) for given in orders]


async def test_a_slow_reader_misses_nothing(subject: Subject) -> None:
    given = order(max_tokens=25)
    assert await read(subject, given, pause=8) == subject.expected(given)


async def test_a_reader_that_leaves_after_the_first_delta_leaves_nothing_behind(
    subject: Subject,
) -> None:
    source = subject.backend.generate(order(max_tokens=29))
    await anext(source)
    await source.aclose()
    await subject.until_empty()
    with pytest.raises(StopAsyncIteration):
        await anext(source)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 30])
async def test_a_reader_that_is_cancelled_at_any_time_leaves_nothing_behind(
    subject: Subject, turns: int
) -> None:
    tasks = TaskFamily("reader")
    reading = tasks.start(read(subject, order(max_tokens=29)), name="read")
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    reading.cancel()
    await asyncio.wait([reading])
    await subject.until_empty()


async def test_an_answer_nobody_began_to_read_holds_nothing(subject: Subject) -> None:
    source = subject.backend.generate(order())
    assert not await subject.open_requests()
    await source.aclose()


async def test_an_error_is_raised_as_its_leaf_and_leaves_nothing_behind(subject: Subject) -> None:
    with pytest.raises(InvalidValue):
        await read(subject, subject.spoil(order("bad")))
    await subject.until_empty()


async def test_a_name_may_be_used_again_after_its_end(subject: Subject) -> None:
    given = order("same")
    first = await read(subject, given)
    assert await read(subject, given) == first


async def test_it_tells_what_it_serves_and_whether_it_would(subject: Subject) -> None:
    [model] = subject.backend.models()
    assert model.name
    assert model.max_model_len > 0
    assert model.vocab_size > 0
    assert subject.backend.ready().ready
