"""The master's own HTTP routes: /admin/instances, /debug/ledger, /debug/requests and one of them. Read only."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable

from xllm_py.base import process
from xllm_py.base.clock import Clock
from xllm_py.base.errors import RequestNotFound
from xllm_py.master.generations import Generations
from xllm_py.master.instance_manager import InstanceManager, Member
from xllm_py.master.journeys import Journeys
from xllm_py.master.links import Links
from xllm_py.master.router import Router
from xllm_py.openai.exchange import Handler, Request

_MOST_LISTED = 100


class AdminRoutes:
    """Handlers over the master's parts; `table` is what App adds to its routes."""

    def __init__(
        self,
        *,
        manager: InstanceManager,
        links: Links,
        router: Router,
        generations: Generations,
        journeys: Journeys,
        clock: Clock,
        num_streams: Callable[[], int],
    ) -> None:
        """num_streams: open generations at the HTTP door."""
        self._manager = manager
        self._links = links
        self._router = router
        self._generations = generations
        self._journeys = journeys
        self._clock = clock
        self._num_streams = num_streams

    def table(self) -> dict[tuple[str, str], Handler]:
        """(method, pattern) -> handler; App serves those under /debug/ only when it is told to."""
        return {
            ("GET", "/admin/instances"): self.instances,
            ("GET", "/debug/ledger"): self.ledger,
            ("GET", "/debug/requests"): self.requests,
            ("GET", "/debug/requests/{id}"): self.request,
        }

    async def instances(self, request: Request) -> tuple[int, object]:
        """Every instance: card, state, load, links with reasons."""
        now = self._clock.now()
        return 200, {"instances": [self._row(member, now) for member in self._manager.members()]}

    def _row(self, member: Member, now: float) -> dict[str, object]:
        view, load = member.view, member.load
        heard_at = view.heard_at
        return {
            "name": member.card.name,
            "role": member.card.role.name,
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

    async def ledger(self, request: Request) -> tuple[int, object]:
        """Counts that are 0 when idle, and what the process holds."""
        held = process.held()
        return 200, {
            **self._generations.ledger(),
            "streams": self._num_streams(),
            "instance_streams": self._generations.num_streams,
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
