"""Which of several masters decides for the cluster: the one whose address stands under XLLM:SERVICE:MASTER (SPEC 4.3).

All masters serve requests; the elected one beside that gives instances their duties (master/roles). The key is put under the master's
lease, if it is absent, in one transaction with XLLM:SERVICE:TERM = 1 + the greater of what stands there and what any instance has seen, so
terms grow even where the registry was wiped. That no two act for one term is etcd's doing; that an old one does no harm is the instances',
who refuse a lower term. A master unsure of its lease (a third of its time left) acts no more; it comes back under a new term.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

from xllm_py.base import log
from xllm_py.base.errors import ProtocolViolation, RegistryUnavailable
from xllm_py.base.metrics import Metrics
from xllm_py.cluster import keys
from xllm_py.cluster.service_info import service_from_json
from xllm_py.registry.base import Entry, Lease, Put, Registry

LOOK_EVERY_S = 0.5
_MOST_RETRY_S = 5.0

_log = log.get(__name__)


class Election:
    """One master's part in it."""

    def __init__(
        self,
        *,
        address: str,
        cluster_key: bytes,
        seen_by_instances: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        """address: our host:rpc_port. seen_by_instances: the highest term that any instance tells of."""
        self._address = address
        self._cluster_key = cluster_key
        self._seen_by_instances = seen_by_instances
        self._lease: Lease | None = None
        self._lease_id = 0  # that our claim stands under
        self._sure_s = 0.0  # a lease with less left is none to act on
        self._entries: dict[str, Entry] = {}
        self._services: dict[str, str] = {}  # key of a master's record -> its HTTP address
        self._news = asyncio.Event()
        self.term = 0  # of our own claim; 0: we made none
        metrics.gauge("is_leader", "1 while this master is the elected one").set_function(
            lambda: float(self.leads)
        )
        metrics.gauge("term", "Of the elected master").set_function(lambda: float(self.known_term))

    @property
    def leads(self) -> bool:
        """Whether we may act for the cluster now."""
        lease = self._lease
        return (
            lease is not None
            and self.term > 0
            and lease.id == self._lease_id
            and lease.left_s > self._sure_s
            and self.leader == self._address
            and self._seen_by_instances() <= self.term
        )

    @property
    def known_term(self) -> int:
        """As it stands in the registry; 0: none does, or it is no number."""
        entry = self._entries.get(keys.TERM)
        text = entry.value if entry is not None else None
        return int(text) if text is not None and text.isdigit() else 0

    @property
    def leader(self) -> str:
        """host:rpc_port of the elected master, empty when there is none."""
        entry = self._entries.get(keys.ELECTED_MASTER)
        return (entry.value or b"").decode(errors="replace") if entry is not None else ""

    @property
    def leader_http(self) -> str:
        """Where the elected master is asked; empty when its record is not there."""
        return self._services.get(keys.service(self.leader), "")

    async def follow(self, registry: Registry) -> None:
        """Know who is elected, for ever."""
        known, revision = await _listed(registry)
        self._take(known)
        self._news.set()
        async for changes in registry.watch(keys.SERVICES, known, revision):
            self._take(changes)
            self._news.set()

    def _take(self, entries: Iterable[Entry]) -> None:
        before = self.leader
        for entry in entries:
            if entry.key in (keys.ELECTED_MASTER, keys.TERM):
                self._entries[entry.key] = entry
            else:
                self._note_service(entry)
        if self.leader != before:
            _log.info("elected", master=self.leader or "nobody", before=before or "nobody")

    def _note_service(self, entry: Entry) -> None:
        self._services.pop(entry.key, None)
        if entry.value is None:
            return
        try:
            record = service_from_json(entry.value, self._cluster_key)
        except ProtocolViolation as error:
            _log.warning("record of a master is passed over", key=entry.key, reason=error.message)
            return
        self._services[entry.key] = record.http_address

    async def stand(self, registry: Registry, lease: Lease, ttl_s: float) -> None:
        """Be elected whenever nobody is, for ever; the lease is the one of our own record."""
        self._lease, self._sure_s = lease, ttl_s / 3
        await self._news.wait()  # the first list
        wait_s = LOOK_EVERY_S
        while True:
            self._news.clear()
            try:
                if self._is_free() or self._is_outrun():
                    await self._claim(registry)
                wait_s = LOOK_EVERY_S
            except RegistryUnavailable as error:
                wait_s = min(2 * wait_s, _MOST_RETRY_S)
                _log.warning("not elected", reason=error.message)
            pause_s = wait_s * random.uniform(0.75, 1.25)
            try:
                async with asyncio.timeout(pause_s):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _is_free(self) -> bool:
        return not self.leader

    def _is_outrun(self) -> bool:
        """We are elected, but an instance knows a later term (the registry forgot), or our claim is of an earlier life or lease."""
        lease = self._lease
        return self.leader == self._address and (
            lease is None
            or lease.id != self._lease_id
            or self.term == 0
            or self._seen_by_instances() > self.term
        )

    async def _claim(self, registry: Registry) -> None:
        """Once; who comes second learns of it by the watch. Raises RegistryUnavailable."""
        lease = self._lease
        if lease is None or lease.left_s <= self._sure_s:
            return
        entries, _ = await registry.entries(keys.SERVICES)
        self._take(entries)
        held = next((each for each in entries if each.key == keys.ELECTED_MASTER), None)
        if held is not None and not self._is_outrun():
            return
        counted = next((each for each in entries if each.key == keys.TERM), None)
        term = max(self.known_term if counted else 0, self._seen_by_instances(), self.term) + 1
        lease_id = lease.id
        seen = {
            keys.ELECTED_MASTER: held.revision if held else 0,
            keys.TERM: counted.revision if counted else 0,
        }
        puts = [
            Put(key=keys.ELECTED_MASTER, value=self._address.encode(), lease=lease_id),
            Put(key=keys.TERM, value=str(term).encode()),
        ]
        if await registry.swap(seen, puts):
            self.term, self._lease_id = term, lease_id
            self._take([Entry(key=put.key, value=put.value, revision=0) for put in puts])
            _log.info("this master is elected", term=term)


async def _listed(registry: Registry) -> tuple[list[Entry], int]:
    """The first list, whenever it can be had."""
    while True:
        try:
            entries, revision = await registry.entries(keys.SERVICES)
            return list(entries), revision
        except RegistryUnavailable as error:
            _log.warning("masters not listed", reason=error.message)
        await asyncio.sleep(LOOK_EVERY_S)
