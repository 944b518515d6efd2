"""The Registry protocol: keys under leases, a list with its revision, and a watch from a revision that never dies silently.

Used by instance/announcer and master/daemon (a card or record under a lease), master/instance_manager and instance/masters (list
and watch), and registry/cluster_key. Every call has a deadline and raises RegistryUnavailable. Conformance:
tests/conformance/test_registry.py, run against memory, embedded and a real etcd.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key as it was at `revision`; in an event, value None means that the key is gone."""

    key: str
    value: bytes | None
    revision: int  # of its last change


class Lease(Protocol):
    """A lease that keeps itself alive, and comes back with everything put under it when it was lost."""

    @property
    def id(self) -> int:
        """The registry's name for it; another one after it was lost."""
        ...

    @property
    def left_s(self) -> float:
        """How long it surely lives on, counted from when the last renewal was sent; 0 or less: it may be gone."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Put under the lease, and again whenever the lease had to be granted anew."""
        ...

    async def revoke(self) -> None:
        """Delete everything under it and stop; never raises, the lease ends by itself at the latest."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """A key to be written, under a lease as it is named now (Lease.id), 0: under none."""

    key: str
    value: bytes
    lease: int = 0


class Registry(Protocol):
    """See the module's text."""

    @property
    def up(self) -> bool:
        """Whether the last word with the registry went well."""
        ...

    async def lease(self, ttl_s: int) -> Lease:
        """A new lease, renewed every third of its time to live."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Put without a lease."""
        ...

    async def swap(self, seen: Mapping[str, int], puts: Sequence[Put]) -> bool:
        """All puts at once if every key of `seen` was last changed at that revision, 0: is absent; else nothing, and False.

        Raises RegistryUnavailable also when a lease is gone.
        """
        ...

    async def get(self, key: str) -> bytes | None:
        """The value, or None."""
        ...

    async def entries(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """All entries under a prefix, and the revision at which this was true."""
        ...

    async def delete(self, key: str) -> bool:
        """True when it was there."""
        ...

    def watch(
        self, prefix: str, known: Sequence[Entry], revision: int
    ) -> AsyncGenerator[list[Entry], None]:
        """Changes after `revision`, for ever, in order.

        `known` is what entries() returned at that revision: when changes were missed (compaction, a wiped registry) the watch
        lists again and yields the difference. It resumes with back-off after every error.
        """
        ...

    async def close(self) -> None:
        """End watches, leases stay to their end; idempotent."""
        ...


class EtcdAccess(Protocol):
    """What the lease and the watch loop need of the etcd client."""

    kv: Any
    leases: Any
    watches: Any

    async def call(self, method: Any, request: Any) -> Any:
        """One unary call with a deadline. Raises RegistryUnavailable."""
        ...

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        ...

    def key(self, key: str) -> bytes:
        """With the namespace."""
        ...

    def end_of(self, start: bytes) -> bytes:
        """The first key after a prefix."""
        ...

    def entry(self, record: Any) -> Entry:
        """Our value of etcd's KeyValue."""
        ...

    async def entries(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """See Registry."""
        ...
