"""Pairs (P, D): makes every D accept offers of every P, and ends that when P is gone.

One task per pair, so that a hung peer stalls nobody else; a pair that cannot be linked is tried again with back-off and shows
its reason in /ready and /admin/instances. Told by the instance manager that members changed; it decides no liveness.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from xllm_py.base import log
from xllm_py.base.errors import LayoutMismatch, XllmError
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card, Role, inexact
from xllm_py.cluster.membership import InstanceState
from xllm_py.master.instance_manager import InstanceManager, Member
from xllm_py.master.peers import Peers

_log = log.get(__name__)
_FIRST_WAIT_S = 0.2
_MOST_WAIT_S = 10.0
_LINKABLE = frozenset({InstanceState.READY, InstanceState.SUSPECT, InstanceState.DRAINING})


class PairState(Enum):
    """Where a pair stands."""

    TRYING = "trying"
    LINKED = "linked"
    DIFFERS = "differs"  # in model or layout
    UNREACHABLE = "unreachable"


@dataclass(slots=True, kw_only=True)
class Pair:
    """A giver and a taker."""

    prefill: Member
    decode: Member
    state: PairState = PairState.TRYING
    reason: str = ""
    task: asyncio.Task[None] | None = None

    def sentence(self) -> str:
        """For people."""
        names = f"prefill {self.prefill.card.name} and decode {self.decode.card.name}"
        return f"{names}: {self.state.value}" + (f" ({self.reason})" if self.reason else "")


class Links:
    """All wanted pairs of one master."""

    def __init__(
        self, *, manager: InstanceManager, peers: Peers, tasks: TaskFamily, metrics: Metrics
    ) -> None:
        self._manager = manager
        self._peers = peers
        self._tasks = tasks
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._jitter = random.Random()
        self._gauge = metrics.gauge("pair_linked", "1 for a linked pair", ["prefill", "decode"])
        manager.on_changed.append(self.reconcile)

    def reconcile(self) -> None:
        """Start what is newly wanted, end what is not wanted any more."""
        wanted = _wanted(self._manager.members())
        for key in [key for key in self._pairs if key not in wanted]:
            self._end(self._pairs.pop(key))
        for key, pair in wanted.items():
            if key not in self._pairs:
                self._pairs[key] = pair
                pair.task = self._tasks.start(self._link(pair), name=f"link {pair.sentence()}")

    def _end(self, pair: Pair) -> None:
        if pair.task is not None:
            pair.task.cancel()
        names = (pair.prefill.card.name, pair.decode.card.name)
        self._gauge.labels(*names).set(0)
        decode = self._manager.member(pair.decode.card.incarnation_id)
        if decode is not None and decode.view.state in _LINKABLE:
            self._tasks.start(self._unlink(pair), name=f"unlink {pair.sentence()}")

    async def _unlink(self, pair: Pair) -> None:
        """Once; when it fails, D ends the reservations of that giver by their own time."""
        card = pair.prefill.card
        try:
            await self._peers.of(pair.decode.card).unlink_instance(card.name, card.incarnation_id)
        except XllmError as error:
            _log.warning("unlink failed", pair=pair.sentence(), reason=error.message)

    async def _link(self, pair: Pair) -> None:
        wait_s = _FIRST_WAIT_S
        while not await self._try(pair):
            await asyncio.sleep(wait_s * (0.75 + self._jitter.random() / 2))
            wait_s = min(wait_s * 2, _MOST_WAIT_S)
        self._gauge.labels(pair.prefill.card.name, pair.decode.card.name).set(1)

    async def _try(self, pair: Pair) -> bool:
        before = (pair.state, pair.reason)
        try:
            await self._peers.of(pair.decode.card).link_instance(pair.prefill.raw_card)
            pair.state = PairState.LINKED
            pair.reason = inexact(pair.prefill.card, pair.decode.card)
        except LayoutMismatch as error:
            pair.state, pair.reason = PairState.DIFFERS, error.message
        except XllmError as error:
            pair.state, pair.reason = PairState.UNREACHABLE, error.message
        if before != (pair.state, pair.reason):
            exact = pair.state is PairState.LINKED and not pair.reason
            (_log.info if exact else _log.warning)("pair " + pair.sentence())
        return pair.state is PairState.LINKED

    # ---- what others ask ----

    def linked(self) -> frozenset[tuple[str, str]]:
        """Pairs by incarnation that can be used."""
        return frozenset(key for key, pair in self._pairs.items() if pair.state is PairState.LINKED)

    def refused(self) -> tuple[str, ...]:
        """Why pairs that reached each other do not fit."""
        return self._sentences(lambda pair: pair.state is PairState.DIFFERS)

    def unlinked(self) -> tuple[str, ...]:
        """Every pair that cannot be used now, and why."""
        return self._sentences(lambda pair: pair.state is not PairState.LINKED)

    def _sentences(self, chosen: Callable[[Pair], bool]) -> tuple[str, ...]:
        return tuple(sorted(pair.sentence() for pair in self._pairs.values() if chosen(pair)))

    def rows(self, card: Card) -> list[dict[str, str]]:
        """The pairs of one instance, for /admin/instances."""
        rows = []
        for pair in self._pairs.values():
            pair_cards = (pair.prefill.card, pair.decode.card)
            if card not in pair_cards:
                continue
            other = pair_cards[0] if card is pair_cards[1] else pair_cards[1]
            rows.append({"peer": other.name, "state": pair.state.value, "reason": pair.reason})
        return rows


def _wanted(members: list[Member]) -> dict[tuple[str, str], Pair]:
    able = [member for member in members if member.view.state in _LINKABLE]
    givers = [member for member in able if member.card.role in (Role.PREFILL, Role.MIX)]
    takers = [member for member in able if member.card.role in (Role.DECODE, Role.MIX)]
    return {
        (p.card.incarnation_id, d.card.incarnation_id): Pair(prefill=p, decode=d)
        for p in givers
        for d in takers
        if p is not d
    }
