"""KvTransport without sockets and threads: the fake, with programmable loss, delay and damage. For tests and simulation.

All transports of a MemoryNetwork live in one process. Bytes move only inside `poll` (of any of them) or `network.pump()`, so a
test decides when; `Faults` says what happens to them on the way. Frames, sessions and grants are the real ones of wire/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from xllm_py.base.clock import Clock
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS, KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, TakerGrant
from xllm_py.transport.kv_events import Counts, EventQueue
from xllm_py.transport.kv_taking import Taking
from xllm_py.transport.memory_queue import Sending, Sent
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import Header, Reason
from xllm_py.wire.kv_handshake import Identity, Peer
from xllm_py.wire.kv_session import GiverSession, Take
from xllm_py.wire.kv_taker import TakerSession

ACK_S = 5.0  # a COMMIT without an answer for so long: the link has failed


@dataclass(slots=True, kw_only=True)
class Faults:
    """What a link does to the bytes from giver to taker; a frame is a header and its payload, counted from 0."""

    delay_s: float = 0.0
    cut_at_byte: int | None = None
    lose_frames: frozenset[int] = frozenset()
    flip_at_byte: int | None = None  # the lowest bit of that byte
    lose_replies: bool = False


class MemoryNetwork:
    """Who listens where, and the links between them. `faults(giver, taker)` is asked once for each new link."""

    def __init__(
        self, clock: Clock, faults: Callable[[str, str], Faults] = lambda _giver, _taker: Faults()
    ) -> None:
        self.clock = clock
        self.faults = faults
        self.listeners: dict[str, MemoryKvTransport] = {}
        self.links: list[_Link] = []
        self._names = 0

    def fresh(self) -> int:
        """1, 2, 3, ...: names and nonces that repeat from run to run."""
        self._names += 1
        return self._names

    def pump(self) -> None:
        """Move every byte that is due."""
        for link in list(self.links):
            link.move(self.clock.now())


class _Link:
    """Both ends of one connection."""

    def __init__(
        self, giver: MemoryKvTransport, taker: MemoryKvTransport, peer: GiverGrant
    ) -> None:
        self.giver, self.taker = giver, taker
        self.memory = giver.memory.at(peer.block_size)
        self.faults = giver.network.faults(giver.incarnation, taker.incarnation)
        self.sending = Sending()
        self.open = True
        self._out = GiverSession(giver.identity(peer.block_size), Peer(peer.peer_incarnation))
        self._in = TakerSession(taker.identity(), taker.taking.grants)
        self._known = False
        self._told: set[bytes] = set()
        self._frames, self._bytes = 0, 0

    def end(self, reason: str) -> None:
        """Both ends see the link break."""
        if not self.open:
            return
        self.open = False
        self.giver.network.links.remove(self)
        for grant in list(self.sending.givings):
            asker = self.taker if grant in self.taker.probes else self.giver
            self.giver.abandon(grant)
            asker.failed(grant, reason)
        if self._known:
            self.taker.taking.link_lost(self.giver.incarnation, reason)

    def move(self, now: float) -> None:
        """Handshake when that is due, then the frames that are due."""
        if not self._known and self.open:
            refusal = self._shake_hands()
            if refusal is not None:
                self.end(codec.TEXTS[refusal])
        while self.open and (found := self.sending.next(now)) is not None:
            giving, (_, grant, layer, first, block_ids) = found
            if layer < 0:
                giving.committed_s, payload = now, bytes(first)
                self._carry(self._out.probe(grant, first, payload_checksum(payload)), payload)
            elif not block_ids:
                giving.committed_s = now
                payload = giving.frames.commit_payload(giving.grant.prompt_digest)
                self._carry(self._out.commit(grant, payload, payload_checksum(payload)), payload)
            for part in range(PARTS if block_ids else 0):
                if not self.open or grant not in self.sending.givings:
                    break
                payload = b"".join(self.memory.spans(layer, part, block_ids))
                checksum = payload_checksum(payload)
                header, data = self._out.data(grant, layer, part, first, len(block_ids), checksum)
                giving.frames.sent(header)
                self.giver.counts.add("bytes_sent", header.length)
                self._carry(data, payload)
        if self.sending.is_overdue(now - ACK_S):
            self.end("the peer did not acknowledge")

    def _shake_hands(self) -> Reason | None:
        welcome = self._in.on_hello(self._out.hello())
        proof = welcome if isinstance(welcome, Reason) else self._out.on_welcome(welcome)
        refusal = proof if isinstance(proof, Reason) else self._in.on_proof(proof)
        self._known = refusal is None
        return refusal

    def _carry(self, header: bytes, payload: bytes) -> None:
        """Over the wire, with all that can happen there."""
        data = bytearray(header + payload)
        start, index = self._bytes, self._frames
        self._bytes, self._frames = start + len(data), index + 1
        if index in self.faults.lose_frames:
            return
        flip, cut = self.faults.flip_at_byte, self.faults.cut_at_byte
        if flip is not None and start <= flip < self._bytes:
            data[flip - start] ^= 1
        if cut is not None and cut < self._bytes:
            data = data[: max(0, cut - start)]
        if len(data) >= codec.HEADER_BYTES:
            self._arrive(bytes(data[: codec.HEADER_BYTES]), memoryview(data)[codec.HEADER_BYTES :])
        if cut is not None and cut < self._bytes:
            self.end("the link was cut")

    def _arrive(self, header: bytes, body: memoryview) -> None:
        judged = self._in.on_header(header)
        if not isinstance(judged, Take):
            self._answer(judged)
            return
        grant, whole = judged.grant, len(body) == judged.header.length
        if judged.store and grant is not None:
            self.taker.taking.arriving(grant, self.taker.network.clock.now())
            self._write(judged.header, judged.block_ids, body)
        payload = bytes(body) if judged.is_commit else b""
        if whole:
            self.taker.counts.add("bytes_received", len(body) if judged.is_data else 0)
            self._answer(self._in.on_payload(judged, payload_checksum(body), payload))
        else:
            self._in.on_lost(judged)
        self.taker.taking.settle(grant)

    def _write(self, header: Header, block_ids: tuple[int, ...], body: memoryview) -> None:
        memory = self.taker.memory.at(self._in.block_size)
        for view in memory.spans(header.layer, header.part, block_ids):
            part, body = body[: view.nbytes], body[view.nbytes :]
            view[: part.nbytes] = part

    def _answer(self, result: kv_session.Result | kv_session.Asked | kv_session.Closed) -> None:
        match result:  # a link in memory never comes back after it broke, so its giver never asks
            case kv_session.Probed(probe=probe) if self.taker.on_probed(probe):
                self.giver.abandon(probe)
            case kv_session.Probed(probe=probe):
                self._reply(self._in.arrived(probe))
            case kv_session.Landed(grant=grant):
                self.taker.taking.landed(result, self.taker.network.clock.now())
                self._reply(self._in.ack(grant))
            case kv_session.Late(grant=grant) if grant not in self._told:
                self._told.add(grant)
                self.taker.counts.add("frames_late")
                self._reply(self._in.error(Reason.REVOKED, grant))
            case kv_session.Reject(reason=reason, grant=grant, failed=failed):
                self.taker.counts.add("frames_rejected")
                if failed:
                    self.taker.taking.failed(grant, codec.TEXTS[reason])
                self._reply(self._in.error(reason, grant))
                self.end(codec.TEXTS[reason])

    def _reply(self, data: bytes) -> None:
        if self.faults.lose_replies:
            return
        match self._out.on_header(data):
            case kv_session.Acknowledged(grant=grant) if grant in self.sending.givings:
                giving = self.sending.givings.pop(grant)
                now = self.giver.network.clock.now()
                self.giver.end_grant(
                    KvEvent(
                        kind=KvEventKind.ACKNOWLEDGED,
                        grant=grant,
                        num_bytes=giving.frames.num_bytes,
                        seconds=now - giving.since_s,
                        exposed_s=now - (giving.ready_s or now),
                    )
                )
            case kv_session.Refused(grant=grant, reason=reason) if grant in self.sending.givings:
                self.sending.drop(grant)
                self.giver.failed(grant, codec.TEXTS[reason])
            case kv_session.Closed(reason=reason):
                self.end(codec.TEXTS[reason])


class MemoryKvTransport:
    """Implements transport.base.KvTransport."""

    def __init__(
        self, *, network: MemoryNetwork, memory: KvMemory, incarnation: str, cluster_key: bytes
    ) -> None:
        self.network = network
        self.memory = memory
        self.incarnation = incarnation
        self.counts = Counts(
            "bytes_sent", "bytes_received", "frames_rejected", "frames_late", "failures"
        )
        self._cluster_key = cluster_key
        self._events = EventQueue()
        self.taking = Taking(memory=memory, events=self._events, counts=self.counts)
        self._by_grant: dict[bytes, _Link] = {}
        self.fetched: set[bytes] = set()  # read grants of ours that were asked for
        self.probes: dict[bytes, tuple[int, float]] = {}  # that we fetch: bytes, when asked for
        self._closed = False
        self.endpoint = f"127.0.0.1:{network.fresh()}"  # as an address in a card
        network.listeners[self.endpoint] = self

    def identity(self, block_size: int = 0) -> Identity:
        """For one link; block_size of its frames, ours when 0."""
        layout = self.memory.layout
        return Identity(
            incarnation=self.incarnation,
            layout=layout.at(block_size) if block_size else layout,
            share=Share(num_heads=layout.num_heads),
            cluster_key=self._cluster_key,
            nonce=self.network.fresh().to_bytes(codec.NONCE_BYTES, "little"),
        )

    def failed(self, grant: bytes, text: str) -> None:
        """Giver: this grant is dead."""
        self.counts.add("failures")
        self.end_grant(KvEvent(kind=KvEventKind.FAILED, grant=grant, text=text))

    def end_grant(self, event: KvEvent) -> None:
        """Giver: a grant has ended, well or not. Either side: so has a probe of its own."""
        self._by_grant.pop(event.grant, None)
        self.probes.pop(event.grant, None)
        self._events.put(event)

    def on_probed(self, name: bytes) -> bool:
        """Taker: a probe came. Whether it is one that we fetched, which is told here and not to the giver."""
        num_bytes, asked_s = self.probes.pop(name, (0, 0.0))
        if num_bytes:
            self.taking.probed(name, num_bytes, self.network.clock.now() - asked_s)
        return num_bytes > 0

    @property
    def wake_fd(self) -> int:
        """See KvTransport."""
        return self._events.wake.fd

    def open_grant(self, grant: TakerGrant) -> int:
        """See KvTransport."""
        self.taking.open(grant)
        if grant.source:
            giver = self.network.listeners.get(grant.source)
            if giver is None or giver.incarnation != grant.peer_incarnation:
                self.taking.fetching_failed([grant.grant], [], "the giver is not there")
            else:
                giver.on_fetch(grant.read_grant, self)
        return 0

    def on_fetch(self, read_grant: bytes, taker: MemoryKvTransport) -> None:
        """Giver: a taker asks, perhaps before we have its grant."""
        self.fetched.add(read_grant)
        for link in self.network.links:
            if link.giver is self and link.taker is taker:
                link.sending.fetch(read_grant)

    def revoke(self, grant: bytes) -> None:
        """See KvTransport."""
        self.taking.revoke(grant)

    def connect(self, grant: GiverGrant) -> None:
        """See KvTransport."""
        self._assign(grant)

    def probe(self, probe: GiverGrant, num_bytes: int, *, fetch: bool = False) -> None:
        """See KvTransport."""
        if not fetch:
            self.send_probe(probe, num_bytes)
            return
        giver = self.network.listeners.get(probe.endpoint)
        if giver is None or giver.incarnation != probe.peer_incarnation:
            self.failed(probe.grant, "the peer is another process than the one expected")
            return
        self.probes[probe.grant] = (num_bytes, self.network.clock.now())
        asked = replace(probe, endpoints=(self.endpoint,), peer_incarnation=self.incarnation)
        giver.send_probe(asked, num_bytes)

    def send_probe(self, probe: GiverGrant, num_bytes: int) -> None:
        """Giver: whoever asked for it."""
        link = self._assign(probe)
        if link is not None:
            due = self.network.clock.now() + link.faults.delay_s
            link.sending.put((due, probe.grant, -1, num_bytes, ()))

    def _assign(self, grant: GiverGrant) -> _Link | None:
        """To the link of its peer, a new one when there is none."""
        taker = self._taker_of(grant)
        if taker is None:
            self.failed(grant.grant, "nobody listens there")
            return None
        for link in self.network.links:
            if link.giver is self and link.taker is taker:
                break
        else:
            link = _Link(self, taker, grant)
            self.network.links.append(link)
        wanted = not grant.read_grant or grant.read_grant in self.fetched
        link.sending.givings[grant.grant] = Sent(grant, self.network.clock.now(), wanted=wanted)
        self.fetched.discard(grant.read_grant)
        self._by_grant[grant.grant] = link
        return link

    def _taker_of(self, grant: GiverGrant) -> MemoryKvTransport | None:
        """One that fetches names no endpoint."""
        if not grant.read_grant:
            return self.network.listeners.get(grant.endpoint)
        takers = self.network.listeners.values()
        return next((each for each in takers if each.incarnation == grant.peer_incarnation), None)

    def push(
        self, grant: bytes, layer: int, first_relative: int, block_ids: tuple[int, ...]
    ) -> None:
        """See KvTransport."""
        link = self._by_grant.get(grant)
        if link is None:
            return
        step = codec.blocks_per_frame(link.memory.layout.block_bytes)
        for start in range(0, len(block_ids), step):
            due = self.network.clock.now() + link.faults.delay_s
            blocks = block_ids[start : start + step]
            link.sending.put((due, grant, layer, first_relative + start, blocks))

    def commit(self, grant: bytes) -> None:
        """See KvTransport."""
        link, now = self._by_grant.get(grant), self.network.clock.now()
        if link is not None:
            link.sending.givings[grant].ready_s = now
            link.sending.put((now + link.faults.delay_s, grant, 0, 0, ()))

    def abandon(self, grant: bytes) -> None:
        """See KvTransport."""
        link = self._by_grant.pop(grant, None)
        if link is not None:
            link.sending.drop(grant)

    def poll(self) -> list[KvEvent]:
        """See KvTransport."""
        self.network.pump()
        return self._events.take()

    def ledger(self) -> dict[str, int]:
        """See KvTransport."""
        links = sum(self in (link.giver, link.taker) for link in self.network.links)
        return {
            "grants_open": len(self.taking.grants),
            "grants_given": len(self._by_grant),
            "links": links,
            **self.counts.read(),
        }

    def close(self) -> None:
        """See KvTransport."""
        if self._closed:
            return
        self._closed = True
        self.network.listeners.pop(self.endpoint)
        for link in list(self.network.links):
            if self in (link.giver, link.taker):
                link.end("the peer closed the link")
        self._events.wake.close()
