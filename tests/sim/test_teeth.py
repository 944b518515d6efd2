"""The simulator bites: each bug planted here is found by one of the first seeds. A bug that is not found makes its checks worthless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sim import run as sim
from tests.sim import seeds
from tests.sim.run import Story, run, simulating
from tests.sim.world import Wrong
from xllm_py.cluster import inflight
from xllm_py.core.batch import Batch
from xllm_py.core.block_manager import BlockManager
from xllm_py.core.handoff import Action, FreeBlocks, Giver, GiverState, Verdict
from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.request import Request
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.taking import TakingAgent
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination
from xllm_py.instance.relay import Relay

SEEDS = range(400)
Plant = Callable[[pytest.MonkeyPatch], None]


def finish_dropped(patch: pytest.MonkeyPatch) -> None:
    """D's last words do not reach the stream."""
    send = Generations.send

    def forgetful(self: Generations, destination: Destination, outputs: Outputs) -> None:
        if not any(outputs.finish_reasons):
            send(self, destination, outputs)

    patch.setattr(Generations, "send", forgetful)


def block_freed_early(patch: pytest.MonkeyPatch) -> None:
    """P frees its blocks when it has pushed them, not when D has them."""

    def advance(self: Giver) -> list[Action]:
        actions = genuine(self)
        return [*actions, FreeBlocks()] if actions else actions

    genuine = Giver._advance
    patch.setattr(Giver, "_advance", advance)


def preempted_but_still_computed(patch: pytest.MonkeyPatch) -> None:
    """The blocks go, the belief in what they held stays."""
    preempt = Batch._preempt

    def careless(self: Batch, request: Request) -> None:
        computed = request.num_computed
        preempt(self, request)
        request.hashes.clear()
        request.num_computed = computed

    patch.setattr(Batch, "_preempt", careless)
    patch.setattr(Batch, "_admit", _admit_without_looking(Batch._admit))


def _admit_without_looking(admit: Callable[..., None]) -> Callable[..., None]:
    def careless(self: Batch, *args: Any) -> None:
        believed = {request: request.num_computed for request in self.waiting}
        admit(self, *args)
        for request in self.running:
            request.num_computed = max(request.num_computed, believed.get(request, 0))

    return careless


def shared_block_written(patch: pytest.MonkeyPatch) -> None:
    """No copy on write: choices write into one block."""
    patch.setattr(BlockManager, "is_sole", lambda self, block: True)


def release_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Quarantined blocks never come back."""
    patch.setattr(Scheduler, "released", lambda self, request_id, attempt: None)


def lost_reservation_kept(patch: pytest.MonkeyPatch) -> None:
    """Ended grants are not taken back from the transport."""
    patch.setattr(TakingAgent, "revoke_ended", lambda self: None)


def stale_token_repeated(patch: pytest.MonkeyPatch) -> None:
    """What the log has already is written once more."""

    def append(choice: inflight.ChoiceLog, entry: inflight.Entry) -> inflight.Judged:
        choice.append(entry)
        return inflight.Judged(inflight.Judgement.APPENDED, len(choice.ids))

    patch.setattr(inflight, "_compare", append)


def lost_instance_not_told(patch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a dead instance waits for ever."""
    patch.setattr(inflight.Inflight, "on_lost", lambda self, incarnation, message, died: [])


def both_decode(patch: pytest.MonkeyPatch) -> None:
    """P says that it is done before D has acknowledged anything."""

    def commit_is_enough(self: Giver) -> list[Action]:
        actions = genuine(self)
        if self.state is GiverState.COMMITTED:
            self._move(GiverState.DONE)
            return [FreeBlocks(), Verdict("landed")]
        return actions

    genuine = Giver._advance
    patch.setattr(Giver, "_advance", commit_is_enough)


def relay_ends_with_one_choice(patch: pytest.MonkeyPatch) -> None:
    """What the simulator found first of all (seed 39 of its first version)."""
    patch.setattr(Relay, "_end", lambda self, request_id, choice: self.close(request_id))


def all_fail_with_the_poisonous(patch: pytest.MonkeyPatch) -> None:
    """A step that raises is held against everybody in it."""
    genuine = Scheduler.on_crash

    def harsh(self: Scheduler, plan: StepPlan, message: str, now: float) -> bool:
        for request in list(self._batch._now.planned):
            self.fail(
                request.request_id, request.submission.attempt, "internal_error", message, now
            )
        return genuine(self, plan, message, now)

    patch.setattr(Scheduler, "on_crash", harsh)


def flush_takes_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    """Published blocks are forgotten although somebody reads them."""

    def flush(self: BlockManager) -> int:
        held = [block for block in self._published if block not in self._idle]
        for block in held:
            digest, _ = self._published.pop(block)
            del self._by_hash[digest]
            self._free.append(block)
        return len(held)

    patch.setattr(BlockManager, "flush", flush)


PLANTS: list[Plant] = [
    finish_dropped,
    block_freed_early,
    preempted_but_still_computed,
    shared_block_written,
    release_forgotten,
    lost_reservation_kept,
    stale_token_repeated,
    lost_instance_not_told,
    both_decode,
    relay_ends_with_one_choice,
    all_fail_with_the_poisonous,
    flush_takes_what_is_in_use,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    monkeypatch.setattr(sim, "MOST_S", 8.0)  # what hangs is found sooner
    with simulating():
        for seed in SEEDS:
            try:
                run(seed)
            except Exception as found:  # noqa: BLE001 - whatever the bug leads to
                print(f"{plant.__name__}: seed {seed}: {found!r}"[:300])
                return
    pytest.fail(f"{plant.__doc__} No seed of {SEEDS} minds")


def test_what_is_wrong_names_the_seed_and_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(seed: int) -> Story:
        raise Wrong("a token too many")

    monkeypatch.setattr(seeds, "run", wrong)
    with pytest.raises(
        AssertionError, match=r"(?s)seed 7: .*many.*pytest tests/sim --sim-seed 7"
    ) as found:
        seeds.run_all([7])
    assert isinstance(found.value.__cause__, Wrong)
