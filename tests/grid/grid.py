"""Asks every case alone, then in company in every column of the grid, and compares what clients received, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from tests.grid.cases import FEATURES, SAMPLINGS, Case, Said, prompts
from tests.grid.cluster import Cluster, MakeExecutor, Setup
from tests.openai.support import Answer
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams

SETUPS = (
    Setup(name="DEFAULT"),
    Setup(name="chunk 16", chunk=16),
    Setup(name="PD", is_pd=True),
    Setup(name="PD with P cache", is_pd=True, p_cache=True),
    Setup(name="PD with D cache, fetched", is_pd=True, d_cache=True, pull=True),
    Setup(name="PD with both", is_pd=True, p_cache=True, d_cache=True, chunk=16),
    Setup(name="preempted", num_blocks=40),
)
LONE = Setup(name="lone")
WAVE = 24  # cases that are asked at once
PATH = "/v1/completions"


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A case with its whole body and what a lone engine answers."""

    case: Case
    body: dict[str, Any]
    answer: dict[str, Any]
    tokens: list[list[int]]  # of each candidate


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a column says to a case; whether it went the column's way, and what shows that."""

    answer: dict[str, Any]
    way: bool
    traces: str


@contextlib.asynccontextmanager
async def running(setup: Setup, make: MakeExecutor, folder: Path) -> AsyncGenerator[Cluster, None]:
    """A cluster whose engines turn."""
    cluster = Cluster(setup, make, folder, None)
    engines = asyncio.create_task(cluster.run())
    try:
        yield cluster
        assert not engines.done(), engines.exception()
    finally:
        engines.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await engines
    await cluster.close()


def comparable(answer: Answer) -> dict[str, Any]:
    """What must be equal: all but the names, and how much came from a cache."""
    found: dict[str, Any] = answer.json()
    for name in ("id", "created"):
        found.pop(name, None)
    if "usage" in found:
        del found["usage"]["prompt_tokens_details"]
    return found


async def ask_alone(make: MakeExecutor, folder: Path, wanted: list[Case]) -> list[Asked]:
    """Each case on an engine without cache that computes nothing else, its prompt whole."""
    found: list[Asked] = []
    async with running(LONE, make, folder) as cluster:
        for case in wanted:
            said = None
            if case.asks_first:
                said = await _first(cluster, case)
            body = case.body(said)
            answer = await cluster.ask(PATH, body)
            assert answer.status == 200, (case, answer.body)
            name = answer.json()["id"]
            tokens = [cluster.traces.tokens[name, at] for at in range(case.num_candidates)]
            found.append(Asked(case, body, comparable(answer), tokens))
    return found


async def _first(cluster: Cluster, case: Case) -> Said:
    answer = await cluster.ask(PATH, {**case.body(), "echo": False})
    assert answer.status == 200, (case, answer.body)
    said = answer.json()
    return Said(said["choices"][0]["text"], cluster.traces.tokens[said["id"], 0])


async def ask_in(
    setup: Setup, make: MakeExecutor, folder: Path, asked: list[Asked]
) -> dict[int, Found]:
    """All cases in one column; by their index."""
    async with running(setup, make, folder) as cluster:
        if setup.name == "preempted":
            return {
                index: await _preempted(cluster, setup, index, each)
                for index, each in enumerate(asked)
            }
        if setup.p_cache or setup.d_cache:
            for prompt in sorted({each.case.prompt for each in asked}):
                warm = {"prompt": list(prompt), "max_tokens": 2, "ignore_eos": True}
                assert (await cluster.ask(PATH, warm)).status == 200
        found: dict[int, Found] = {}
        for first in range(0, len(asked), WAVE):
            wave = asked[first : first + WAVE]
            answers = await asyncio.gather(*(cluster.ask(PATH, each.body) for each in wave))
            for index, answer in enumerate(answers, start=first):
                way = _went(cluster, setup, asked[index], answer)
                found[index] = Found(comparable(answer), *way)
        return found


def _went(cluster: Cluster, setup: Setup, asked: Asked, answer: Answer) -> tuple[bool, str]:
    """Whether the traces of the request are those of the column, and what they are."""
    if answer.status != 200:
        return False, "no answer"
    said, traces, case = answer.json(), cluster.traces, asked.case
    name = said["id"]
    cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    verdict, held = traces.verdicts.get(name, ""), traces.held_blocks.get(name, 0)
    chunks, restarts = traces.chunks[name], traces.restarts[name]
    good = [restarts == 0, (cached > 0) == (setup.p_cache and not case.scores_prompt)]
    if setup.is_pd and case.has_several and not setup.d_cache:
        good.append(verdict == "refused")  # D cannot share a prompt: all choices stay on P
    elif setup.is_pd:
        is_short = said["usage"]["completion_tokens"] == case.num_candidates
        ways = {"finished_on_p" if is_short else "landed"}
        if "stop string" in case.features:  # the door ends it, maybe before P hears that it landed
            ways.add("cancelled")
        good.append(verdict in ways)
        good.append((held > 0) == setup.d_cache)
    if setup.chunk == 16:
        good.append(chunks == -(-(len(case.prompt) - cached) // setup.chunk) - 1)
    return all(good), f"{verdict=} {held=} {cached=} {chunks=} {restarts=}"


async def _preempted(cluster: Cluster, setup: Setup, index: int, asked: Asked) -> Found:
    """An older request grows until the case gives its blocks back: in its middle or, when it is too short for that, at once."""
    for spare in dict.fromkeys((index % 3, 0)):
        cluster.company = _company(setup, index, len(asked.case.prompt), spare)
        answer = await cluster.ask(PATH, asked.body)
        cluster.rest()
        assert answer.status == 200, (asked.case, answer.body)
        restarts = cluster.traces.restarts[answer.json()["id"]]
        if restarts:
            break
    # an answer of one token has no middle
    is_short = asked.answer["usage"]["completion_tokens"] == asked.case.num_candidates
    return Found(comparable(answer), restarts > 0 or is_short, f"{restarts=} {spare=}")


def _company(setup: Setup, index: int, num_prompt: int, spare: int) -> Submission:
    """All blocks but `spare` and those of a prompt beside it; it grows a little further than that."""
    size = setup.block_size
    beside = -(-num_prompt // size) + spare
    sampling = SamplingParams(
        max_tokens=min(beside, spare + 2) * size, temperature=0.0, seed=0, ignore_eos=True
    )
    prompt = tuple((index + at) % 200 for at in range((setup.num_blocks - beside) * size))
    return Submission(request_id=f"company {index} {spare}", prompt_ids=prompt, sampling=sampling)


def check(setup: Setup, asked: list[Asked], found: dict[int, Found]) -> None:
    """Every case has the lone answer and went its way."""
    wrong: list[str] = []
    for index, each in enumerate(asked):
        case, said = each.case, found[index]
        name = f"{case.group}, {case.sampling}, prompt {case.prompt[0]}"
        if said.answer != each.answer:
            wrong.append(f"{name}: {said.answer} and alone {each.answer}")
        elif not said.way:
            wrong.append(f"{name}: nothing shows that it went this way: {said.traces}")
    assert not wrong, f"{len(wrong)} of {len(asked)}:\n" + "\n".join(wrong[:12])


async def check_features(
    make: MakeExecutor, folder: Path, num_ids: int, without: frozenset[str] = frozenset()
) -> None:
    """Equal answers prove nothing of a feature that does nothing: each changes the answers it should change."""
    features = [each for each in FEATURES if each not in without]
    async with running(LONE, make, folder) as cluster:
        for sampling in SAMPLINGS:
            changed: set[str] = set()
            for prompt in prompts(num_ids):
                plain = Case((), sampling, prompt)
                before = comparable(await cluster.ask(PATH, plain.body()))
                said = await _first(cluster, plain)
                for feature in features:
                    body = Case((feature,), sampling, prompt).body(said)
                    after = comparable(await cluster.ask(PATH, body))
                    if feature == "min_tokens":
                        assert after["usage"]["completion_tokens"] > 5, (body, after)
                    if after != before:
                        changed.add(feature)
            assert changed == set(features), sampling
