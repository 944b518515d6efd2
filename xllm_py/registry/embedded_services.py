"""The gRPC faces of the embedded registry's store: one class per service of etcd's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from xllm_py.registry.etcd_stubs import kv_pb2, rpc_pb2, rpc_pb2_grpc
from xllm_py.registry.memory import Record, Store

Context = grpc.aio.ServicerContext[Any, Any]
_MEMBER = 1
_COMPACTED = "etcdserver: mvcc: required revision has been compacted"
_PROGRESS_S = 600.0  # etcd's own interval of progress notifications


def _header(store: Store) -> rpc_pb2.ResponseHeader:
    return rpc_pb2.ResponseHeader(
        cluster_id=1, member_id=_MEMBER, revision=store.revision, raft_term=1
    )


def _kv(record: Record, *, keys_only: bool = False) -> kv_pb2.KeyValue:
    value = b"" if keys_only or record.value is None else record.value
    return kv_pb2.KeyValue(
        key=record.key,
        value=value,
        create_revision=record.create_revision if record.value is not None else 0,
        mod_revision=record.mod_revision,
        version=record.version,
        lease=record.lease,
    )


class Kv(rpc_pb2_grpc.KVServicer):
    """Range, Put, DeleteRange, Txn, Compact."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def Range(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Keys in a range; historic revisions are not kept."""
        if request.revision and request.revision <= self._store.compacted:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, _COMPACTED)
        return self._range(request)

    def _range(self, request: Any) -> Any:
        self._store.expire()
        found = self._store.range(request.key, request.range_end)
        if request.sort_target:
            names = {1: "version", 2: "create_revision", 3: "mod_revision", 4: "value"}
            found.sort(key=lambda record: getattr(record, names[request.sort_target]))
        if request.sort_order == rpc_pb2.RangeRequest.DESCEND:
            found.reverse()
        shown = found[: request.limit] if request.limit else found
        kvs = (
            []
            if request.count_only
            else [_kv(record, keys_only=request.keys_only) for record in shown]
        )
        return rpc_pb2.RangeResponse(
            header=_header(self._store), kvs=kvs, more=len(shown) < len(found), count=len(found)
        )

    async def Put(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Put, under a lease if one is named."""
        await self._check_leases([request], context)
        return self._put(request)

    async def _check_leases(self, puts: list[Any], context: Context) -> None:
        """Before anything is written."""
        if any(put.lease and put.lease not in self._store.leases for put in puts):
            await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")

    def _put(self, request: Any) -> Any:
        before = self._store.records.get(request.key)
        value = before.value or b"" if request.ignore_value and before else request.value
        lease = before.lease if request.ignore_lease and before else request.lease
        self._store.put(request.key, value, lease)
        previous = _kv(before) if request.prev_kv and before else None
        return rpc_pb2.PutResponse(header=_header(self._store), prev_kv=previous)

    async def DeleteRange(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Delete a range."""
        return self._delete(request)

    def _delete(self, request: Any) -> Any:
        keys = [record.key for record in self._store.range(request.key, request.range_end)]
        gone = self._store.delete(keys)
        previous = [_kv(record) for record in gone] if request.prev_kv else []
        return rpc_pb2.DeleteRangeResponse(
            header=_header(self._store), deleted=len(gone), prev_kvs=previous
        )

    async def Txn(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Compare, then one of two lists of operations."""
        self._store.expire()
        chosen = request.success if self._all_hold(request) else request.failure
        await self._check_leases([op.request_put for op in chosen], context)
        return self._txn(request)

    def _txn(self, request: Any) -> Any:
        good = self._all_hold(request)
        responses = [self._operate(op) for op in (request.success if good else request.failure)]
        return rpc_pb2.TxnResponse(header=_header(self._store), succeeded=good, responses=responses)

    def _all_hold(self, request: Any) -> bool:
        return all(self._holds(compare) for compare in request.compare)

    def _operate(self, op: Any) -> Any:
        kind = op.WhichOneof("request")
        if kind == "request_range":
            return rpc_pb2.ResponseOp(response_range=self._range(op.request_range))
        if kind == "request_put":
            return rpc_pb2.ResponseOp(response_put=self._put(op.request_put))
        if kind == "request_delete_range":
            return rpc_pb2.ResponseOp(response_delete_range=self._delete(op.request_delete_range))
        return rpc_pb2.ResponseOp(response_txn=self._txn(op.request_txn))

    def _holds(self, compare: Any) -> bool:
        kind = compare.WhichOneof("target_union")
        record = self._store.records.get(compare.key)
        if record is None and kind == "value":
            return False
        have: Any = getattr(record, kind or "version", 0) if record is not None else 0
        want: Any = getattr(compare, kind) if kind else 0
        outcomes = {
            rpc_pb2.Compare.EQUAL: have == want,
            rpc_pb2.Compare.GREATER: have > want,
            rpc_pb2.Compare.LESS: have < want,
            rpc_pb2.Compare.NOT_EQUAL: have != want,
        }
        return bool(outcomes[compare.result])

    async def Compact(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Forget history."""
        if request.revision <= self._store.compacted:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, _COMPACTED)
        if request.revision > self._store.revision:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE,
                "etcdserver: mvcc: required revision is a future revision",
            )
        self._store.compact(request.revision)
        return rpc_pb2.CompactionResponse(header=_header(self._store))


class LeaseService(rpc_pb2_grpc.LeaseServicer):
    """Grant, Revoke, KeepAlive, TimeToLive, Leases."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def LeaseGrant(self, request: Any, context: Context) -> Any:  # noqa: N802
        """etcd gives no lease under 2 s."""
        ttl = max(2, request.TTL)
        lease = self._store.grant(ttl, request.ID)
        return rpc_pb2.LeaseGrantResponse(header=_header(self._store), ID=lease, TTL=ttl)

    async def LeaseRevoke(self, request: Any, context: Context) -> Any:  # noqa: N802
        """End a lease."""
        if not self._store.revoke(request.ID):
            await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
        return rpc_pb2.LeaseRevokeResponse(header=_header(self._store))

    async def LeaseKeepAlive(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncGenerator[Any, None]:
        """A stream of renewals; TTL 0 says that the lease is gone."""
        async for request in requests:
            ttl = int(self._store.keep_alive(request.ID))
            yield rpc_pb2.LeaseKeepAliveResponse(
                header=_header(self._store), ID=request.ID, TTL=ttl
            )

    async def LeaseTimeToLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        """What is left of a lease, -1 when it is gone."""
        left, granted = self._store.time_to_live(request.ID)
        records = self._store.records.values()
        keys = [r.key for r in records if r.lease == request.ID] if request.keys else []
        return rpc_pb2.LeaseTimeToLiveResponse(
            header=_header(self._store), ID=request.ID, TTL=left, grantedTTL=granted, keys=keys
        )

    async def LeaseLeases(self, request: Any, context: Context) -> Any:  # noqa: N802
        """All leases."""
        leases = [rpc_pb2.LeaseStatus(ID=lease) for lease in self._store.leases]
        return rpc_pb2.LeaseLeasesResponse(header=_header(self._store), leases=leases)


class WatchService(rpc_pb2_grpc.WatchServicer):
    """Watch: many watches on one stream."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def Watch(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncGenerator[Any, None]:
        """Create, cancel, progress; changes as they come."""
        stream = _WatchStream(self._store)
        reader = asyncio.get_running_loop().create_task(stream.read(requests))
        reader.add_done_callback(lambda _: stream.wake())
        self._store.listeners.add(stream.wake)
        try:
            while not (reader.done() and not stream.has_news()):
                for answer in stream.take():
                    yield answer
                await stream.wait()
            if not reader.cancelled():
                reader.result()  # what the reader died of is this call's error
        finally:
            self._store.listeners.discard(stream.wake)
            reader.cancel()


class _WatchStream:
    """The watches of one stream: id -> (key, end, next revision, wants previous values, filters)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watches: dict[int, tuple[Any, int]] = {}
        self._answers: list[Any] = []
        self._news = asyncio.Event()
        self._next_id = 0

    def wake(self) -> None:
        """Something changed in the store."""
        self._news.set()

    def has_news(self) -> bool:
        """Whether something waits to be taken."""
        return bool(self._answers)

    async def wait(self) -> None:
        """Until there is news; at least every ten minutes, for progress."""
        try:
            async with asyncio.timeout(_PROGRESS_S):
                await self._news.wait()
        except TimeoutError:
            for watch in self._watches:
                self._answers.append(
                    rpc_pb2.WatchResponse(header=_header(self._store), watch_id=watch)
                )

    async def read(self, requests: AsyncIterator[Any]) -> None:
        """The client's side of the stream."""
        async for request in requests:
            self._on_request(request)
            self._news.set()

    def _on_request(self, request: Any) -> None:
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            self._create(request.create_request)
        elif kind == "cancel_request":
            watch = request.cancel_request.watch_id
            self._watches.pop(watch, None)
            self._answers.append(
                rpc_pb2.WatchResponse(header=_header(self._store), watch_id=watch, canceled=True)
            )
        else:
            self._answers.append(rpc_pb2.WatchResponse(header=_header(self._store), watch_id=-1))

    def _create(self, create: Any) -> None:
        watch = self._next_id
        self._next_id += 1
        start = create.start_revision or self._store.revision + 1
        header = _header(self._store)
        self._answers.append(rpc_pb2.WatchResponse(header=header, watch_id=watch, created=True))
        self._watches[watch] = (create, start)

    def take(self) -> list[Any]:
        """All answers that are due."""
        self._news.clear()
        for watch, (create, start) in list(self._watches.items()):
            try:
                changes = self._store.since(start)
            except LookupError:
                del self._watches[watch]
                self._answers.append(
                    rpc_pb2.WatchResponse(
                        header=_header(self._store),
                        watch_id=watch,
                        canceled=True,
                        compact_revision=self._store.compacted,
                        cancel_reason=_COMPACTED,
                    )
                )
                continue
            self._watches[watch] = (create, max(start, self._store.revision + 1))
            events = [
                event for change, before in changes if (event := _event(create, change, before))
            ]
            if events:
                self._answers.append(
                    rpc_pb2.WatchResponse(
                        header=_header(self._store), watch_id=watch, events=events
                    )
                )
        answers, self._answers = self._answers, []
        return answers


def _event(create: Any, change: Record, before: Record | None) -> Any:
    """etcd's event when the watch asked for this change, else None."""
    end = create.range_end
    inside = (
        change.key == create.key
        if not end
        else change.key >= create.key and (end == b"\0" or change.key < end)
    )
    deleted = change.value is None
    unwanted = rpc_pb2.WatchCreateRequest.NODELETE if deleted else rpc_pb2.WatchCreateRequest.NOPUT
    if not inside or unwanted in create.filters:
        return None
    return kv_pb2.Event(
        type=kv_pb2.Event.DELETE if deleted else kv_pb2.Event.PUT,
        kv=_kv(change),
        prev_kv=_kv(before) if create.prev_kv and before else None,
    )


class Maintenance(rpc_pb2_grpc.MaintenanceServicer):
    """Status."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def Status(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Enough for `etcdctl endpoint status` and health."""
        return rpc_pb2.StatusResponse(
            header=_header(self._store),
            version="3.4.0",
            leader=_MEMBER,
            raftIndex=self._store.revision,
            raftTerm=1,
        )


class Cluster(rpc_pb2_grpc.ClusterServicer):
    """MemberList: one member."""

    def __init__(self, store: Store, address: str) -> None:
        self._store = store
        self._address = address

    async def MemberList(self, request: Any, context: Context) -> Any:  # noqa: N802
        """One member, ourselves."""
        member = rpc_pb2.Member(ID=_MEMBER, name="embedded", clientURLs=[f"http://{self._address}"])
        return rpc_pb2.MemberListResponse(header=_header(self._store), members=[member])
