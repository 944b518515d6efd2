"""The instance's card in the registry: put under a lease once it can serve, changed when its state changes, revoked at the end."""

from __future__ import annotations

import asyncio

from xllm_py.base import log
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Card, card_key, card_to_json
from xllm_py.registry.base import Lease, Registry

_log = log.get(__name__)
_AGAIN_S = 1.0  # a card is not put again more often than this


class Announcer:
    """Owns card and lease."""

    def __init__(
        self, *, registry: Registry, cluster_key: bytes, ttl_s: int, tasks: TaskFamily
    ) -> None:
        self._registry = registry
        self._key = card_key(cluster_key)
        self._ttl_s = ttl_s
        self._tasks = tasks
        self._lease: Lease | None = None
        self._card: Card | None = None
        self._putting: asyncio.Task[None] | None = None

    async def announce(self, card: Card) -> None:
        """Put the card. Raises RegistryUnavailable."""
        self._card = card
        if self._lease is None:
            self._lease = await self._registry.lease(self._ttl_s)
        await self._lease.put(keys.instance(card.role, card.name), card_to_json(card, self._key))

    def signed(self) -> bytes:
        """The card as it stands in the registry."""
        return card_to_json(self._card, self._key) if self._card is not None else b""

    def put_again(self) -> None:
        """A master does not know us: the card may be gone."""
        if self._putting is None or self._putting.done():
            self._putting = self._tasks.start(self._put_again(), name="put card again")

    async def _put_again(self) -> None:
        if self._card is not None:
            try:
                await self.announce(self._card)
            except RegistryUnavailable as error:
                _log.warning("card not put", reason=error.message)
        await asyncio.sleep(_AGAIN_S)

    async def withdraw(self) -> None:
        """Take the card away: no master sends anything new. Masters that miss it until we are gone do not bring it back."""
        self._card = None
        if self._lease is not None:
            await self._lease.revoke()
            self._lease = None
