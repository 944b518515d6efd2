"""The instance's own routes beside OpenAI's: the ledger and the journeys of requests (SPEC 7.1, 7.7)."""

from __future__ import annotations

from xllm_py.base import process
from xllm_py.base.errors import RequestNotFound
from xllm_py.instance.parts import Parts
from xllm_py.openai.exchange import Handler, Request

HOLDINGS = ("free", "active", "cached", "staged", "quarantined")


class InstanceRoutes:
    """Handlers over the instance's parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def table(self) -> dict[tuple[str, str], Handler]:
        """For openai.app."""
        return {
            ("GET", "/debug/ledger"): self.ledger,
            ("GET", "/debug/requests/{id}"): self.request,
            ("POST", "/debug/flush_cache"): self.flush,
        }

    async def ledger(self, request: Request) -> tuple[int, object]:
        """Blocks, grants, links, requests, rows, tasks, file handles, resident bytes; engine and API process."""
        parts = self._parts
        counts = await parts.engine.ledger()
        every = [process.held(), *(process.held(pid) for pid in parts.engine.pids)]
        extra = {
            "outlets": parts.outlets.num_open,
            "tasks": parts.tasks.size,
            "file_handles": sum(each.file_handles for each in every),
            "threads": sum(each.threads for each in every),
            "resident_bytes": sum(each.resident_bytes for each in every),
        }
        if parts.routed is not None:
            extra["unacknowledged"] = parts.routed.generations.num_unacknowledged
            extra["relayed"] = parts.routed.relay.num_open
        return 200, {**counts, **extra}

    async def flush(self, request: Request) -> tuple[int, object]:
        """Forget the cached prefixes that nobody uses: answers with the blocks as they are then."""
        counts = await self._parts.engine.flush_cache()
        return 200, {name: counts[name] for name in ("total", *HOLDINGS)}

    async def request(self, request: Request) -> tuple[int, object]:
        """The moments of a request that came by this instance's own door."""
        request_id = request.params["id"]
        found = self._parts.records.get(request_id)
        if found is None:
            raise RequestNotFound(f"request {request_id} is unknown here, or was long ago")
        state, moments = found
        return 200, {"request_id": request_id, "state": state, "moments": moments}
