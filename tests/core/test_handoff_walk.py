"""Every interleaving of one handoff, with faults at every point: both sides close, one verdict, one owner, no block lost.

A world is stored as bytes, which also says whether it was seen before. What never changes is stored by its number.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from typing import Any

import pytest

from tests.core.handoff_world import World
from xllm_py.core.admission import Admission
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.request import Submission

_CONSTANTS: list[object] = []


def _constant(number: int) -> object:
    return _CONSTANTS[number]


def _by_number(value: object) -> tuple[Any, ...]:
    for number, known in enumerate(_CONSTANTS):
        if known is value:
            return _constant, (number,)
    _CONSTANTS.append(value)
    return _constant, (len(_CONSTANTS) - 1,)


def freeze(world: World) -> bytes:
    """The world as bytes."""
    into = io.BytesIO()
    pickler = pickle.Pickler(into)
    pickler.dispatch_table = dict.fromkeys((Admission, SchedulerConfig, Submission), _by_number)
    pickler.dump(world)
    return into.getvalue()


def walk(world: World, most_faults: int) -> tuple[int, Counter[tuple[str, ...]]]:
    """Visit every world that can come of this one. Returns how many there are, and how often it ends in which way."""
    first = freeze(world)
    seen = {first}
    stack: list[tuple[bytes, tuple[Any, ...]]] = [(first, ())]
    endings: Counter[tuple[str, ...]] = Counter()
    while stack:
        snapshot, path = stack.pop()
        world = pickle.loads(snapshot)
        moves = world.moves(most_faults)
        if not moves:
            told(path, world.check_end)
            endings[world.place, *world.verdicts] += 1
        for index, move in enumerate(moves):
            if index:
                world = pickle.loads(snapshot)
            steps = (*path, move)
            told(steps, world.play, move)
            told(steps, world.check)
            following = freeze(world)
            if following not in seen:
                seen.add(following)
                stack.append((following, steps))
    return len(seen), endings


def told(path: tuple[Any, ...], call: Any, *values: Any) -> None:
    """Call it; a failure says how one gets there."""
    try:
        call(*values)
    except Exception as error:
        error.add_note(f"after {path}")
        raise


WORLDS = {
    "plain": (World(), 2),
    "the first token is the whole answer": (World(ends_at_first=True), 2),
    "no decode on P": (World(local_decode=False), 1),
    "D is full at first": (World(full=True), 1),
}


def test_without_faults_every_order_of_events_lands() -> None:
    _, endings = walk(World(), 0)
    assert set(endings) == {("given", "landed")}


@pytest.mark.parametrize("name", WORLDS)
def test_every_interleaving_closes_both_sides_with_one_verdict_and_one_owner(name: str) -> None:
    world, most_faults = WORLDS[name]
    num_worlds, endings = walk(world, most_faults)
    assert num_worlds > 1000
    assert ("ended", "cancelled") in endings
    good = ("ended", "finished_on_p") if world.ends_at_first else ("given", "landed")
    assert good in endings
    assert (("kept", "lost") in endings) == world.local_decode
    if not world.ends_at_first:
        assert ("failed", "lost") in endings
