"""D's end of one KV link over TCP: writes granted blocks and does nothing else, in the thread of who made it: tcp_accepted when the
giver connected, tcp_fetching when we did.

All links share one GrantTable under one lock (`Taking`); a payload is read without the lock, straight into the blocks that the
header's grant names. A grant that is revoked in mid-frame gets no byte more: the rest of the frame goes into the sink. A link that
does wrong is told why and closed; no exception leaves its thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from xllm_py.base import failpoints, log
from xllm_py.base.clock import Clock
from xllm_py.base.hashing import Checksum, payload_checksum
from xllm_py.transport import tcp_socket
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.stage import Stage
from xllm_py.transport.tcp_handshake import TakerEnd
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Reason
from xllm_py.wire.kv_grants import MAX_REMEMBERED, GrantState
from xllm_py.wire.kv_session import Take

LINGER_S = 0.25  # how long a rejected peer gets to read why
_SINK_BYTES = 1 << 18

_log = log.get(__name__)


class TakerLink:
    """One connection whose handshake is done."""

    def __init__(
        self,
        end: TakerEnd,
        taking: Taking,
        *,
        clock: Clock,
        await_frame: Callable[[], None] | None = None,
        on_probed: Callable[[bytes], None] | None = None,
    ) -> None:
        """await_frame: called before each frame, returns when there may be one; on_probed: hears of probes that came."""
        self._sock, self._session, self._ring = end
        self._taking = taking
        self._clock = clock
        self._await_frame = await_frame
        self._on_probed = on_probed
        self._rejected = ""  # why we closed it
        self._told: set[bytes] = set()  # revoked grants of which the peer knows
        self._sink = memoryview(bytearray(_SINK_BYTES))
        memory, route = taking.memory.at(self._session.block_size), self._session.route
        self._memory = memory.heads(route.target, route.count) if route is not None else memory
        self._stage = Stage(self._memory)

    def serve(self) -> str:
        """Until the link ends. Returns why it did."""
        try:
            while self._serve_frame():
                pass
            return self._rejected or "the giver gave the link up"
        except LinkBroken as broken:
            return self._rejected or broken.message
        except OSError as error:
            return self._rejected or f"KV link: {error.strerror or error}"

    def _serve_frame(self) -> bool:
        """Take one frame; False when the link is to be closed."""
        if self._await_frame is not None:
            self._await_frame()
        data = self._read_header()
        with self._taking.lock:
            judged = self._session.on_header(data)
        match judged:
            case Take():
                return self._take(judged)
            case kv_session.Asked(grant=grant, landed=landed):
                say = self._session.ack if landed else self._session.again
                tcp_socket.write_all(self._sock, say(grant), self._clock)
                return True
            case kv_session.Late():
                return self._answer(judged)
            case kv_session.Reject():
                self._reject(judged)
        return False

    def _read_header(self) -> bytes:
        """Idle links wait here for ever; half a header has to become a whole one soon."""
        data = bytearray(codec.HEADER_BYTES)
        views = [memoryview(data)]
        progress_s = 0.0
        while views:
            count = tcp_socket.read_into(self._sock, views)
            views = tcp_socket.advance(views, count)
            now = self._clock.now()
            if count:
                progress_s = now
            elif progress_s and now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("half a frame header")
        return bytes(data)

    def _take(self, take: Take) -> bool:
        grant = take.grant
        try:
            checksum, payload = self._read_payload(take)
        except (LinkBroken, OSError):
            with self._taking.lock:
                left_early = take.grant is not grant
                self._session.on_lost(take)
                if not left_early:
                    self._taking.settle(grant)
            raise
        with self._taking.lock:
            left_early = take.grant is not grant
            result = self._session.on_payload(take, checksum, payload)
            if not left_early:
                self._taking.settle(grant)
            if isinstance(result, kv_session.Landed):
                self._taking.landed(result, self._clock.now())
        if take.is_data:
            self._taking.counts.add("bytes_received", take.header.length)
        taken = self._ring.news() if self._ring is not None else None
        if taken is not None:
            tcp_socket.write_all(self._sock, self._session.taken(taken), self._clock)
        return self._answer(result)

    def _answer(self, result: kv_session.Result) -> bool:
        if isinstance(result, kv_session.Landed):
            failpoints.hit("d.kv.post_commit")
            tcp_socket.write_all(self._sock, self._session.ack(result.grant), self._clock)
        elif isinstance(result, kv_session.Probed):
            if self._on_probed is not None:
                self._on_probed(result.probe)
            tcp_socket.write_all(self._sock, self._session.arrived(result.probe), self._clock)
        elif isinstance(result, kv_session.Late) and result.grant not in self._told:
            if len(self._told) >= MAX_REMEMBERED:
                self._told.clear()  # to be told twice does no harm
            self._told.add(result.grant)
            self._taking.counts.add("frames_late")
            error = self._session.error(Reason.REVOKED, result.grant)
            tcp_socket.write_all(self._sock, error, self._clock)
        elif isinstance(result, kv_session.Reject):
            self._reject(result)
            return False
        return True

    def _read_payload(self, take: Take) -> tuple[int, bytes]:
        """(checksum of what came, the bytes themselves when it is a COMMIT)."""
        if take.is_commit:
            failpoints.hit("d.kv.pre_commit")
        elif take.store:
            failpoints.hit("d.kv.frame")
            self._arriving(take)
        if self._ring is not None:
            with self._ring.take(take.header.length) as there:
                return self._read_beside(take, there)
        if take.is_commit:
            payload = bytearray(take.header.length)
            self._fill(take, [memoryview(payload)], len(payload))
            return payload_checksum(payload), bytes(payload)
        if take.store:
            return self._write_blocks(take), b""
        return self._drain(take.header.length), b""

    def _read_beside(self, take: Take, there: memoryview) -> tuple[int, bytes]:
        """`_read_payload` of one that did not come over the socket."""
        header = take.header
        if take.is_commit:
            payload = bytes(there)
            return payload_checksum(payload), payload
        if not take.store:
            return payload_checksum(there), b""
        if self._is_revoked(take):
            return header.checksum, b""  # nothing of it is used
        return self._stage.land(header.layer, header.part, take.block_ids, there), b""

    def _arriving(self, take: Take) -> None:
        with self._taking.lock:
            if take.grant is not None:
                self._taking.arriving(take.grant, self._clock.now())

    def _write_blocks(self, take: Take) -> int:
        header = take.header
        self._stage.clear()
        staged = self._stage.wants(take.block_ids)
        if staged:
            views = [self._stage.room(header.length)]
        else:
            views = self._memory.spans(header.layer, header.part, take.block_ids)
        left = self._fill(take, views, header.length)
        if left:
            self._drain(left)
            return header.checksum  # nothing of it is used
        if staged:
            return self._stage.land(header.layer, header.part, take.block_ids, views[0])
        return payload_checksum(*views)

    def _fill(self, take: Take, views: list[memoryview], left: int) -> int:
        """Read into the views, `left` bytes; stops when the grant is revoked meanwhile. Returns the number of bytes left."""
        progress_s = self._clock.now()
        while not (take.store and self._is_revoked(take)):
            count = tcp_socket.read_into(self._sock, views)
            left -= count
            if not left:
                return 0
            views = tcp_socket.advance(views, count)
            now = self._clock.now()
            if count:
                progress_s = now
            elif now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("the giver stopped in the middle of a frame")
        return left

    def _is_revoked(self, take: Take) -> bool:
        """When it is, the frame leaves the blocks here and now."""
        grant = take.grant
        if grant is None or grant.state is not GrantState.REVOKED:
            return False
        with self._taking.lock:
            self._session.leave(take)
            self._taking.settle(grant)
        return True

    def _drain(self, length: int) -> int:
        """Read `length` bytes into the sink; returns their checksum."""
        checksum = Checksum()
        progress_s = self._clock.now()
        while length:
            view = self._sink[: min(length, _SINK_BYTES)]
            count = tcp_socket.read_into(self._sock, [view])
            checksum.add(view[:count])
            length -= count
            now = self._clock.now()
            if count:
                progress_s = now
            elif now - progress_s > tcp_socket.STALL_S:
                raise LinkBroken("the giver stopped in the middle of a frame")
        return checksum.value

    def _reject(self, reject: kv_session.Reject) -> None:
        """Say why, and give the peer a moment to read it: bytes of ours on the way would be lost by a reset."""
        text = self._rejected = codec.TEXTS[reject.reason]
        self._taking.counts.add("frames_rejected")
        _log.warning("KV frame rejected", peer=self._session.peer, reason=text)
        if reject.failed:
            with self._taking.lock:
                self._taking.failed(reject.grant, text)
        error = self._session.error(reject.reason, reject.grant)
        tcp_socket.write_all(self._sock, error, self._clock)
        socket.socket.shutdown(self._sock, socket.SHUT_WR)
        deadline = self._clock.now() + LINGER_S
        while self._clock.now() < deadline:
            tcp_socket.read_into(self._sock, [self._sink])
