"""A watch that never dies silently: from the last revision seen, again and again, with jittered back-off.

When etcd says that the revision was compacted away, or its revisions went back (a wiped etcd), the prefix is listed again and the
difference to what was known is yielded as changes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc

from xllm_py.base import log
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.registry.base import Entry, EtcdAccess
from xllm_py.registry.etcd_stubs import kv_pb2, rpc_pb2

_FIRST_RETRY_S = 0.1
_MOST_RETRY_S = 2.0

_log = log.get(__name__)


class _Compacted(Exception):
    """The revision we wanted is gone."""


class EtcdWatch:
    """One watch of one prefix."""

    def __init__(
        self, etcd: EtcdAccess, prefix: str, known: Sequence[Entry], revision: int
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._known = {entry.key: entry for entry in known}
        self._revision = revision

    async def changes(self) -> AsyncGenerator[list[Entry], None]:
        """See Registry.watch."""
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                async for entries in self._stream():
                    retry_s = _FIRST_RETRY_S
                    yield entries
            except grpc.aio.AioRpcError as error:
                _log.warning("watch broken, resuming", code=error.code().name, after=self._revision)
            except _Compacted:
                _log.warning("watch missed changes, listing again", after=self._revision)
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
            retry_s = min(retry_s * 2, _MOST_RETRY_S)
            try:
                difference = await self._list_again()
            except RegistryUnavailable:
                continue  # the registry says so in `up`; the next round tries again
            if difference:
                yield difference

    async def _stream(self) -> AsyncGenerator[list[Entry], None]:
        start = self._etcd.key(self._prefix)
        create = rpc_pb2.WatchCreateRequest(
            key=start,
            range_end=self._etcd.end_of(start),
            start_revision=self._revision + 1,
            progress_notify=True,
        )
        call = self._etcd.watches.Watch(metadata=self._etcd.metadata())
        try:
            await call.write(rpc_pb2.WatchRequest(create_request=create))
            while True:
                answer = await call.read()
                if answer is grpc.aio.EOF:
                    return
                if answer.canceled or answer.compact_revision:
                    raise _Compacted
                self._revision = max(self._revision, answer.header.revision)
                entries = [self._note(event) for event in answer.events]
                if entries:
                    yield entries
        finally:
            call.cancel()

    def _note(self, event: Any) -> Entry:
        entry = self._etcd.entry(event.kv)
        if event.type == kv_pb2.Event.DELETE:
            entry = Entry(key=entry.key, value=None, revision=entry.revision)
            self._known.pop(entry.key, None)
        else:
            self._known[entry.key] = entry
        return entry

    async def _list_again(self) -> list[Entry]:
        """What differs from the last word; also right after an ordinary break, when nothing does."""
        found, revision = await self._etcd.entries(self._prefix)
        now = {entry.key: entry for entry in found}
        gone = [
            Entry(key=key, value=None, revision=revision) for key in self._known if key not in now
        ]
        changed = [
            entry
            for key, entry in now.items()
            if key not in self._known or self._known[key].value != entry.value
        ]
        self._known, self._revision = now, revision
        return [*gone, *changed]
