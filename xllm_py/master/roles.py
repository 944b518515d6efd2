"""Gives flexible instances their duties, while this master is the elected one; the deciding is cluster/duties'.

Reads what heartbeats and the router's costs say, a few times a second, and answers an instance's heartbeat with its duty until the
instance says that it has it. Everything else of the master reads duties from the instances' own words (InstanceManager).
"""

from __future__ import annotations

import asyncio
import dataclasses

from xllm_py.base import log
from xllm_py.base.errors import InvalidValue, NotLeader, RequestNotFound, RoleNeeded
from xllm_py.base.metrics import Metrics
from xllm_py.cluster import duties
from xllm_py.cluster.duties import Duties, Duty, Move, Standing
from xllm_py.cluster.instance_info import Card, Role
from xllm_py.cluster.membership import InstanceState
from xllm_py.master.election import Election
from xllm_py.master.instance_manager import InstanceManager, Member
from xllm_py.master.router import Router
from xllm_py.wire.control_messages import HeartbeatReply

LOOK_EVERY_S = 0.25
_ABLE = frozenset({InstanceState.READY, InstanceState.SUSPECT})

_log = log.get(__name__)


class Roles:
    """One master's orders to instances; none while another one is elected."""

    def __init__(
        self,
        *,
        manager: InstanceManager,
        router: Router,
        election: Election,
        metrics: Metrics,
    ) -> None:
        self._manager = manager
        self._router = router
        self._election = election
        self._duties: dict[str, Duties] = {}  # by model: instances of another one help nobody
        self._term = 0  # that what follows is of
        self._epoch = 0
        self._given: dict[str, Duty] = {}  # by incarnation
        self._moves = metrics.counter("role_moves", "Duties given to instances", ["role", "cause"])
        manager.on_forgotten.append(self._forget)

    def _forget(self, card: Card) -> None:
        self._given.pop(card.incarnation_id, None)

    async def keep(self) -> None:
        """Look and decide, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Once."""
        if not self._leads():
            return
        of_models: dict[str, list[Standing]] = {}
        for each in self._standings():
            of_models.setdefault(each.card.model_fingerprint, []).append(each)
        for model, standings in of_models.items():
            duties_of_model = self._duties.setdefault(model, Duties())
            for move in duties_of_model.look(standings, self._manager.now()):
                self._give(move)

    def _leads(self) -> bool:
        """Whether we decide; who was just elected begins with what instances say."""
        if not self._election.leads:
            return False
        if self._term != self._election.term:
            self._term, self._epoch = self._election.term, 0
            self._duties, self._given = {}, {}
        return True

    def _give(self, move: Move) -> Duty:
        self._epoch += 1
        duty = Duty(
            role=move.role,
            term=self._term,
            epoch=self._epoch,
            settled=move.settled,
            by_hand=move.by_hand,
        )
        self._given[move.key] = duty
        self._moves.labels(role=move.role.name, cause=move.cause).inc()
        member = self._manager.member(move.key)
        name = member.card.name if member is not None else move.key
        _log.info("duty given", name=name, role=move.role.name, cause=move.cause, duty=duty)
        return duty

    def order(self, reply: HeartbeatReply, incarnation: str) -> HeartbeatReply:
        """The answer to a heartbeat, with our word on it."""
        if not self._leads():
            return reply
        return dataclasses.replace(reply, term=self._term, duty=self._given.get(incarnation))

    def _standings(self) -> list[Standing]:
        return [
            self._standing(member)
            for member in self._manager.members()
            if member.view.state in _ABLE and member.ready_at is not None
        ]

    def _standing(self, member: Member) -> Standing:
        key, load = member.card.incarnation_id, member.load
        prefill, decode = self._router.pressures(key)
        return Standing(
            card=member.card,
            duty=self._given.get(key) or member.duty,
            idle=not load.waiting_requests + load.running_requests,
            prefill=prefill,
            decode=decode,
        )

    def election_row(self) -> dict[str, object]:
        """Who is elected, for people."""
        election = self._election
        return {
            "leader": election.leader,
            "leader_http": election.leader_http,
            "term": election.known_term,
            "leads": election.leads,
        }

    def set_by_hand(self, name: str, role: Role | None) -> Duty:
        """As somebody wants it; role None: leave it to the cluster again.

        Raises NotLeader, RequestNotFound, InvalidValue when its role is fixed, RoleNeeded when nobody would be left for the other half.
        """
        if not self._leads():
            asked = self._election.leader_http
            where = f"ask {asked}" if asked else "none is elected now; try again soon"
            raise NotLeader(f"another master gives duties: {where}", retry_after_s=1.0)
        standings = self._standings()
        chosen = next((each for each in standings if each.card.name == name), None)
        if chosen is None:
            raise RequestNotFound("no instance of this name serves; see /admin/instances")
        if not duties.movable(chosen.card):
            raise InvalidValue(
                f"{name} is fixed to {chosen.card.role.name}; start it with --instance_role=MIX or "
                "--enable_flexible_role"
            )
        if role is None:
            move = Move(
                key=chosen.key,
                role=chosen.role,
                settled=chosen.is_settled,
                by_hand=False,
                cause="hand",
            )
            return self._give(move)
        model = chosen.card.model_fingerprint
        same = [each for each in standings if each.card.model_fingerprint == model]
        found = duties.by_hand(same, chosen.key, role)
        if found is None:
            raise RoleNeeded(
                f"without {name} nobody would be left for what {role.name} does not do"
            )
        return self._give(found)
