"""The Backend and the routes the HTTP door has before the master is complete: it answers /health while etcd is still awaited.

The daemon makes the door first, so that its port is bound, and puts the real backend in when there is one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from xllm_py.base.errors import NoInstances
from xllm_py.core.request import Submission
from xllm_py.master.admin import ROUTES, AdminRoutes
from xllm_py.openai.backend import Backend, Delta, Readiness, ServedModel, Told
from xllm_py.openai.exchange import Handler, Request


class Front:
    """Implements openai.backend.Backend by another one that comes later."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._routes: dict[tuple[str, str], Handler] = {}

    def open(self, backend: Backend, routes: AdminRoutes) -> None:
        """From now on requests go there."""
        self._backend = backend
        self._routes = routes.table()

    def table(self) -> dict[tuple[str, str], Handler]:
        """The admin routes, refused until `open`."""
        return {route: self._late(route) for route in ROUTES}

    def _late(self, route: tuple[str, str]) -> Handler:
        async def handle(request: Request) -> tuple[int, object]:
            handler = self._routes.get(route)
            if handler is None:
                raise NoInstances("the master is still starting")
            return await handler(request)

        return handle

    def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See Backend."""
        if self._backend is None:
            raise NoInstances("the master is still starting")
        return self._backend.generate(submission, told)

    async def recall(self, stream_id: str) -> Told | None:
        """See Backend."""
        return await self._backend.recall(stream_id) if self._backend is not None else None

    def models(self) -> tuple[ServedModel, ...]:
        """See Backend."""
        return self._backend.models() if self._backend is not None else ()

    def explain(self, request_id: str) -> str:
        """See Backend."""
        return self._backend.explain(request_id) if self._backend is not None else ""

    def ready(self) -> Readiness:
        """See Backend."""
        if self._backend is None:
            return Readiness(ready=False, reasons=("loading",), details=("waiting for etcd",))
        return self._backend.ready()
