"""The masters this instance works for: found in the registry, told every heartbeat, given one Generations stream each.

A master that does not answer is told again at the next beat; its requests end in instance/generations when it stays away. One whose
record is gone is told as long as it answers: an etcd that was away comes back without the records of masters that live.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from xllm_py.base import log
from xllm_py.base.errors import ProtocolViolation, RegistryUnavailable, XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster import keys
from xllm_py.cluster.service_info import service_from_json
from xllm_py.control.client import MasterClient
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination
from xllm_py.registry.base import Entry, Registry
from xllm_py.wire.control_messages import Heartbeat, HeartbeatReply

_RETRY_S = 1.0
_log = log.get(__name__)


class Masters:
    """All masters in the registry."""

    def __init__(
        self,
        *,
        cluster_key: bytes,
        client: Callable[[str], MasterClient],
        beat: Callable[[int, int], Heartbeat],
        interval_s: float,
        generations: Generations,
        on_reply: Callable[[HeartbeatReply, int], None],
        tasks: TaskFamily,
    ) -> None:
        """beat makes a heartbeat with a sequence number and the cache's news from a number on; on_reply: a master answered the
        one of this number.
        """
        self._cluster_key = cluster_key
        self._client = client
        self._beat = beat
        self._interval_s = interval_s
        self._generations = generations
        self._on_reply = on_reply
        self._tasks = tasks
        self._beating: dict[str, asyncio.Task[None]] = {}  # key in the registry -> its heartbeat
        self._addresses: dict[str, str] = {}
        self._unlisted: set[str] = set()  # keys of _beating whose record is gone

    async def follow(self, registry: Registry) -> None:
        """List, then watch, for ever."""
        entries, revision = await self._first_list(registry)
        self.on_entries(entries)
        async for changes in registry.watch(keys.SERVICES, entries, revision):
            self.on_entries(changes)

    async def _first_list(self, registry: Registry) -> tuple[Sequence[Entry], int]:
        while True:
            try:
                return await registry.entries(keys.SERVICES)
            except RegistryUnavailable as error:
                _log.warning("masters not listed", reason=error.message)
            await asyncio.sleep(_RETRY_S)

    def on_entries(self, entries: Iterable[Entry]) -> None:
        """Records of masters came, changed or went."""
        for entry in entries:
            if entry.key in (keys.ELECTED_MASTER, keys.TERM):
                continue
            address = _address(entry, self._cluster_key)
            if not address:
                if entry.key in self._beating:
                    self._unlisted.add(entry.key)
                continue
            self._unlisted.discard(entry.key)
            if address == self._addresses.get(entry.key):
                continue
            task = self._forget(entry.key)
            if task is not None:
                task.cancel()
            _log.info("master found", master=address)
            self._addresses[entry.key] = address
            name = f"heartbeat {address}"
            self._beating[entry.key] = self._tasks.start(self._tell(entry.key, address), name=name)

    def _forget(self, key: str) -> asyncio.Task[None] | None:
        self._unlisted.discard(key)
        self._addresses.pop(key, None)
        return self._beating.pop(key, None)

    async def _tell(self, key: str, address: str) -> None:
        """One master's heartbeats, until its record is gone and it does not answer."""
        client = self._client(address)
        sequence = cache_next = 0
        answered = True
        try:
            while True:
                self._generations.open(Destination(address))
                try:
                    reply = await client.heartbeat(self._beat(sequence, cache_next))
                    cache_next = reply.cache_next
                    self._on_reply(reply, sequence)
                    answered = True
                except XllmError as error:
                    if answered:
                        _log.warning("master does not answer", master=address, reason=error.message)
                    answered = False
                    if key in self._unlisted:
                        self._forget(key)
                        return
                sequence += 1
                await asyncio.sleep(self._interval_s)
        finally:
            await client.close()


def _address(entry: Entry, cluster_key: bytes) -> str:
    """The rpc address in a master's record; empty when it is gone or not signed with the cluster key."""
    if entry.value is None:
        return ""
    try:
        return service_from_json(entry.value, cluster_key).rpc_address
    except ProtocolViolation as error:
        _log.warning("record of a master is passed over", key=entry.key, reason=error.message)
        return ""
