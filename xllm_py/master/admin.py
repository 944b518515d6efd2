"""The master's own HTTP routes: /admin/instances, the draining of one and its role, /debug/ledger, /debug/requests and one of them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable

from xllm_py.base import process
from xllm_py.base.errors import InstanceLost, InvalidValue, PeerUnavailable, RequestNotFound
from xllm_py.cluster.duties import Duty
from xllm_py.cluster.instance_info import Role
from xllm_py.master.instance_manager import InstanceManager, Member
from xllm_py.master.journeys import Journeys
from xllm_py.master.links import Links
from xllm_py.master.peers import Peers
from xllm_py.master.roles import Roles
from xllm_py.master.router import Router
from xllm_py.openai.exchange import Handler, Request

_MOST_LISTED = 100
_DRAIN_S = 30.0
_MOST_DRAIN_S = 3600.0
ROUTES = (
    ("GET", "/admin/instances"),
    ("POST", "/admin/instances/{name}/drain"),
    ("POST", "/admin/instances/{name}/role"),
    ("GET", "/admin/requests/{id}"),
    ("GET", "/debug/ledger"),
    ("GET", "/debug/requests"),
    ("GET", "/debug/requests/{id}"),
)


class AdminRoutes:
    """Handlers over the master's parts; `table` is what App adds to its routes."""

    def __init__(
        self,
        *,
        manager: InstanceManager,
        links: Links,
        router: Router,
        journeys: Journeys,
        peers: Peers,
        roles: Roles,
        counts: Callable[[], dict[str, int]],
    ) -> None:
        """counts: what is 0 when idle, and the open streams of instances."""
        self._manager = manager
        self._links = links
        self._router = router
        self._journeys = journeys
        self._peers = peers
        self._roles = roles
        self._counts = counts

    def table(self) -> dict[tuple[str, str], Handler]:
        """(method, pattern) -> handler; App serves those under /debug/ only when it is told to."""
        handlers = (
            self.instances,
            self.drain,
            self.role,
            self.request,
            self.ledger,
            self.requests,
            self.request,
        )
        return dict(zip(ROUTES, handlers, strict=True))

    async def instances(self, request: Request) -> tuple[int, object]:
        """Every instance: card, state, load, duty, links with reasons; and which master is elected."""
        now = self._manager.now()
        rows = [self._row(member, now) for member in self._manager.members()]
        return 200, {"instances": rows, "election": self._roles.election_row()}

    def _row(self, member: Member, now: float) -> dict[str, object]:
        view, load = member.view, member.load
        heard_at = view.heard_at
        return {
            "name": member.card.name,
            "role": member.card.role.name,
            "duty": _duty_row(member.duty),
            "state": view.state.value,
            "reason": view.reason,
            "since_s": round(now - view.since, 3),
            "heard_s": None if heard_at is None else round(now - heard_at, 3),
            "has_card": view.has_card,
            "card": dataclasses.asdict(member.card),
            "load": {**dataclasses.asdict(load), "kv_usage": round(load.kv_usage, 4)},
            "progress": dataclasses.asdict(member.progress),
            "links": self._links.rows(member.card),
            "policy": self._router.inputs(member.card.incarnation_id),
        }

    async def drain(self, request: Request) -> tuple[int, object]:
        """Have an instance leave: {"mode": "finish" or "move", "timeout_s": how long what runs may go on}. It ends when it is empty."""
        mode, timeout_s = _drain_order(request.body)
        name = request.params["name"]
        member = next((each for each in self._manager.members() if each.card.name == name), None)
        if member is None:
            raise RequestNotFound("no instance of this name is known; see /admin/instances")
        try:
            count = await self._peers.of(member.card).drain(mode, timeout_s)
        except PeerUnavailable as error:
            raise InstanceLost("the instance does not answer") from error
        return 202, {"name": name, "mode": mode, "open_requests": count}

    async def role(self, request: Request) -> tuple[int, object]:
        """Give an instance that may do either its duty: {"role": "PREFILL", "DECODE" or "MIX"}; "auto": leave it to the cluster again."""
        duty = self._roles.set_by_hand(request.params["name"], _role_order(request.body))
        return 202, {"name": request.params["name"], "duty": _duty_row(duty)}

    async def ledger(self, request: Request) -> tuple[int, object]:
        """Counts that are 0 when idle, and what the process holds."""
        held = process.held()
        return 200, {
            **self._counts(),
            "tasks": len(asyncio.all_tasks()),
            "file_handles": held.file_handles,
            "resident_bytes": held.resident_bytes,
        }

    async def requests(self, request: Request) -> tuple[int, object]:
        """The stories of the last ones, newest first."""
        newest = itertools.islice(self._journeys.newest_first(), _MOST_LISTED)
        return 200, {"requests": [record.row() for record in newest]}

    async def request(self, request: Request) -> tuple[int, object]:
        """One request's story."""
        record = self._journeys.get(request.params["id"])
        if record is None:
            raise RequestNotFound("no such request is remembered; the last 1000 of 10 minutes are")
        return 200, record.row()


def _duty_row(duty: Duty | None) -> dict[str, object] | None:
    """As it is shown; None: none was given."""
    return {**dataclasses.asdict(duty), "role": duty.role.name} if duty is not None else None


def _role_order(body: bytes) -> Role | None:
    """The role that is asked for; None: auto. Raises InvalidValue."""
    try:
        word = json.loads(body)["role"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidValue('the body is not {"role": "PREFILL"}') from error
    if word == "auto":
        return None
    if word not in ("PREFILL", "DECODE", "MIX"):
        raise InvalidValue("role is PREFILL, DECODE, MIX or auto", param="role")
    return Role[word]


def _drain_order(body: bytes) -> tuple[str, float]:
    """Mode and seconds; an empty body asks to finish within 30 s. Raises InvalidValue."""
    try:
        asked = json.loads(body or b"{}")
        mode, timeout_s = asked.get("mode", "finish"), float(asked.get("timeout_s", _DRAIN_S))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidValue(
            'the body is not {"mode": "finish" or "move", "timeout_s": seconds}'
        ) from error
    if mode not in ("finish", "move"):
        raise InvalidValue("mode is finish or move", param="mode")
    if not 0 <= timeout_s <= _MOST_DRAIN_S:
        raise InvalidValue(f"timeout_s lies in 0 to {_MOST_DRAIN_S:g}", param="timeout_s")
    return mode, timeout_s
