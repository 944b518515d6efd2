"""The fake registry, and the store under both it and the embedded server: keys with revisions, history, leases.

The store is plain synchronous state on a Clock; whoever wants to wait for changes registers a listener.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from xllm_py.base.clock import Clock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.registry.base import Entry, Lease, Put


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A key-value with etcd's bookkeeping; value None marks a deletion."""

    key: bytes
    value: bytes | None
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Store:
    """One registry's content."""

    def __init__(self, clock: Clock, first_lease: int = 7001) -> None:
        """first_lease: the number of the first lease. Who kept one of another life of the registry must not find it here, with another's keys."""
        self._clock = clock
        self.revision = 1
        self.compacted = 0
        self.records: dict[bytes, Record] = {}
        self.history: list[tuple[Record, Record | None]] = []  # change, and what was there before
        self.leases: dict[int, tuple[float, float]] = {}  # id -> (ttl, end)
        self.listeners: set[Callable[[], None]] = set()
        self._next_lease = first_lease

    def put(self, key: bytes, value: bytes, lease: int = 0) -> Record:
        """Put at a new revision."""
        before = self.records.get(key)
        self.revision += 1
        record = Record(
            key=key,
            value=value,
            create_revision=before.create_revision if before else self.revision,
            mod_revision=self.revision,
            version=before.version + 1 if before else 1,
            lease=lease,
        )
        self.records[key] = record
        self._log(record, before)
        return record

    def delete(self, keys: Sequence[bytes]) -> list[Record]:
        """Delete those that exist, all at one new revision; returns what was there."""
        found = [self.records.pop(key) for key in keys if key in self.records]
        if found:
            self.revision += 1
        for record in found:
            gone = replace(record, value=None, mod_revision=self.revision, version=0, lease=0)
            self._log(gone, record)
        return found

    def _log(self, change: Record, before: Record | None) -> None:
        self.history.append((change, before))
        for listener in list(self.listeners):
            listener()

    def range(self, key: bytes, end: bytes = b"") -> list[Record]:
        """etcd's ranges: one key, [key, end), or everything from key on when end is a zero byte; sorted by key."""
        if not end:
            return [self.records[key]] if key in self.records else []
        names = [name for name in self.records if name >= key and (end == b"\0" or name < end)]
        return [self.records[name] for name in sorted(names)]

    def since(self, revision: int) -> list[tuple[Record, Record | None]]:
        """Changes at or after a revision. Raises LookupError when they were compacted away."""
        if revision <= self.compacted:
            raise LookupError(self.compacted)
        return [entry for entry in self.history if entry[0].mod_revision >= revision]

    def compact(self, revision: int) -> None:
        """Forget changes up to a revision."""
        self.compacted = max(self.compacted, revision)
        self.history = [entry for entry in self.history if entry[0].mod_revision > revision]

    def grant(self, ttl_s: float, wanted: int = 0) -> int:
        """A new lease; its id."""
        lease = wanted or self._next_lease
        self._next_lease += 1
        self.leases[lease] = (ttl_s, self._clock.now() + ttl_s)
        return lease

    def keep_alive(self, lease: int) -> float:
        """Renew; the time to live, 0 when the lease is gone."""
        self.expire()
        if lease not in self.leases:
            return 0.0
        ttl_s, _ = self.leases[lease]
        self.leases[lease] = (ttl_s, self._clock.now() + ttl_s)
        return ttl_s

    def time_to_live(self, lease: int) -> tuple[int, int]:
        """(left, granted) seconds; (-1, 0) when the lease is gone."""
        self.expire()
        if lease not in self.leases:
            return -1, 0
        ttl_s, end = self.leases[lease]
        return int(end - self._clock.now()), int(ttl_s)

    def revoke(self, lease: int) -> bool:
        """End a lease and delete its keys."""
        if self.leases.pop(lease, None) is None:
            return False
        self.delete([key for key, record in self.records.items() if record.lease == lease])
        return True

    def expire(self) -> None:
        """End leases whose time is over."""
        now = self._clock.now()
        for lease in [lease for lease, (_, end) in self.leases.items() if end <= now]:
            self.revoke(lease)


class MemoryLease:
    """Implements base.Lease; lives until revoked or until the test lets it lapse."""

    def __init__(self, store: Store, lease: int) -> None:
        self._store = store
        self._lease = lease
        self.left_s = float("inf")  # a test sets it

    @property
    def id(self) -> int:
        """See Lease."""
        return self._lease

    async def put(self, key: str, value: bytes) -> None:
        """See Lease."""
        self._store.put(key.encode(), value, self._lease)

    async def revoke(self) -> None:
        """See Lease."""
        self.left_s = 0.0
        self._store.revoke(self._lease)


class MemoryRegistry:
    """Implements base.Registry over a store that several of them may share."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.up = True  # a test sets it to False: every call fails

    def _check(self) -> Store:
        if not self.up:
            raise RegistryUnavailable("the memory registry was switched off")
        return self._store

    async def lease(self, ttl_s: int) -> Lease:
        """See Registry. The lease does not lapse while this object lives."""
        store = self._check()
        return MemoryLease(store, store.grant(float("inf")))

    async def put(self, key: str, value: bytes) -> None:
        """See Registry."""
        self._check().put(key.encode(), value)

    async def swap(self, seen: Mapping[str, int], puts: Sequence[Put]) -> bool:
        """See Registry."""
        store = self._check()
        for key, revision in seen.items():
            record = store.records.get(key.encode())
            if (record.mod_revision if record else 0) != revision:
                return False
        if any(put.lease and put.lease not in store.leases for put in puts):
            raise RegistryUnavailable("the lease is gone")
        for put in puts:
            store.put(put.key.encode(), put.value, put.lease)
        return True

    async def get(self, key: str) -> bytes | None:
        """See Registry."""
        record = self._check().records.get(key.encode())
        return record.value if record else None

    async def entries(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """See Registry."""
        store = self._check()
        names = [name for name in sorted(store.records) if name.startswith(prefix.encode())]
        return [_entry(store.records[name]) for name in names], store.revision

    async def delete(self, key: str) -> bool:
        """See Registry."""
        return bool(self._check().delete([key.encode()]))

    async def watch(
        self, prefix: str, known: Sequence[Entry], revision: int
    ) -> AsyncGenerator[list[Entry], None]:
        """See Registry."""
        news = asyncio.Event()
        self._store.listeners.add(news.set)
        try:
            while True:
                news.clear()
                changes = [change for change, _ in self._store.since(revision + 1)]
                revision = self._store.revision
                found = [_entry(c) for c in changes if c.key.startswith(prefix.encode())]
                if found:
                    yield found
                else:
                    await news.wait()
        finally:
            self._store.listeners.discard(news.set)

    async def close(self) -> None:
        """See Registry."""


def _entry(record: Record) -> Entry:
    return Entry(
        key=record.key.decode(errors="replace"), value=record.value, revision=record.mod_revision
    )
