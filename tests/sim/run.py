"""Runs one seed and says what went wrong: the checks of TRUST that a simulation can make, for every request and at the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from tests.sim.grpc_memory import memory_grpc
from tests.sim.oracle import right_answer
from tests.sim.script import Script, script_of
from tests.sim.virtual import VirtualLoop
from tests.sim.world import Told, World, Wrong
from xllm_py.base.clock import HandClock
from xllm_py.engine import probing

MOST_S = 60.0  # virtual seconds from the first request until the last one has ended
QUIET_S = 40.0  # and from there until nothing is left of them


@dataclass(kw_only=True)
class Story:
    """How one seed went."""

    script: Script
    words: list[tuple[Any, ...]] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)  # request -> ok, left, or the error's code
    lasted_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)  # how often what was met

    def digest(self) -> str:
        """Of everything that happened, in order."""
        return hashlib.sha256(repr((self.words, self.ends)).encode()).hexdigest()


class _Errors(logging.Handler):
    """What the product logs as an error is one: no simulation may bring it to that, but by a poisonous request."""

    def __init__(self, script: Script) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        self._poison = any(ask.poison_at is not None for ask in script.asks)

    def emit(self, record: logging.LogRecord) -> None:
        if self._poison and record.getMessage() == "step failed":
            return
        text = f"{record.getMessage()} {getattr(record, 'fields', '')}"
        if record.exc_info and record.exc_info[1] is not None:
            text += f" {record.exc_info[1]!r}"
        self.found.append(text)


@contextlib.contextmanager
def simulating() -> Iterator[None]:
    """Around many runs: gRPC in memory, small probes, and no log but errors."""
    logger = logging.getLogger("xllm_py")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        with memory_grpc(), mock.patch.multiple(probing, SMALL_BYTES=16, LARGE_BYTES=64):
            yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def run(seed: int) -> Story:
    """One seed, inside `simulating`. Raises Wrong."""
    return run_script(script_of(seed))


def run_script(script: Script) -> Story:
    """As `run`, of a script made by hand."""
    loop = VirtualLoop(HandClock())
    logger, errors = logging.getLogger("xllm_py"), _Errors(script)
    logger.addHandler(errors)
    story = Story(script=script)
    try:
        loop.run_until_complete(_live(script, loop, story))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except Wrong as wrong:
        raise Wrong("; ".join([str(wrong), *errors.found, *loop.failures])) from None
    finally:
        logger.removeHandler(errors)
        loop.close()
    if errors.found or loop.failures:
        raise Wrong("; ".join([*errors.found, *loop.failures]))
    return story


async def _live(script: Script, loop: VirtualLoop, story: Story) -> None:
    world = World(script, loop)
    story.words, story.counts = world.words, world.tally.counts
    try:
        await world.start()
        began = loop.time()
        _, late = await asyncio.wait(world.play(), timeout=MOST_S)
        if late:
            hanging = [told.ask.name for told in world.told if not told.ends]
            raise Wrong(f"{hanging} did not end in {MOST_S} s: {world.open_things()}")
        for told in world.told:
            story.ends[told.ask.name] = _judge(told, script)
        await _quiet(world, loop)
        story.lasted_s = loop.time() - began
    finally:
        await world.close()


def _judge(told: Told, script: Script) -> str:
    """Its end in a word."""
    ask = told.ask
    if told.ends != 1:
        raise Wrong(f"{ask.name} ended {told.ends} times")
    if told.wrong:
        raise Wrong(f"{ask.name}: {told.wrong}")
    whole = not told.error and not told.left
    if whole and set(told.finishes) != set(range(ask.best_of)):
        raise Wrong(f"{ask.name}: choices {sorted(told.finishes)} of {ask.best_of} have an end")
    if whole and ask.poison_at is not None and ask.poison_at < len(ask.prompt):
        raise Wrong(f"{ask.name} has an answer to a prompt that cannot be computed")
    for choice, tokens in told.choices.items():
        right, reason = right_answer(ask, choice)
        if tokens != right[: len(tokens)]:
            raise Wrong(f"{ask.name} choice {choice}: {tokens}, and not {right}")
        if choice in told.finishes and (tokens, told.finishes[choice]) != (right, reason):
            raise Wrong(
                f"{ask.name} choice {choice} ends with {told.finishes[choice]}: {tokens}, and not {right} by {reason}"
            )
    if told.error and told.error not in _allowed(told, script):
        raise Wrong(f"{ask.name} ended with {told.error}, for which there was no cause")
    return "left" if told.left else told.error or "ok"


def _allowed(told: Told, script: Script) -> set[str]:
    """Errors that this request may end with in this script."""
    codes = set()
    if told.ask.poison_at is not None:
        codes.add("internal_error")
    if told.ask.timeout_s < 10.0:
        codes.add("deadline_exceeded")
    if told.ask.best_of > 1:
        codes.add("best_of_requires_prefix_cache")
    if script.unkind:
        codes.add("instance_lost")
    return codes


async def _quiet(world: World, loop: VirtualLoop) -> None:
    """Until every ledger is empty."""
    end = loop.time() + QUIET_S
    wait_s = 0.02
    while things := world.open_things():
        if loop.time() >= end:
            raise Wrong(f"{QUIET_S} s after the last request there is still {things}")
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 1.5, 1.0)
    for instance in world.instances.values():
        instance.engine.scheduler.assert_empty()
