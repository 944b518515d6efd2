"""Long runs against the KV parser, by hand; tests/wire/test_campaign does a little of each in CI.

    python -m tests.wire.campaign [--frames 10000000] [--flips 100000] [--socket-frames 100000] [--seed 1]

frames: an authenticated peer that says anything, in process: no exception, no frame that takes a second, no byte outside a live
grant. flips: one bit of a whole handoff is flipped, at every place in turn: it is seen, what it spoilt is sent again, and what lands
is what was sent. socket frames: the first over TCP, against the real taker with its threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator

from tests.conformance.kv_pair import LAYOUT as KV_LAYOUT
from tests.conformance.kv_pair import NUM_BLOCKS as KV_BLOCKS
from tests.conformance.kv_pair import Pair, make_tcp
from tests.wire.kv_link import DIGEST, LAYOUT, Link, Taker, grant
from tests.wire.test_kv_fuzz import EDGES, Hostile
from xllm_py.base.hashing import payload_checksum
from xllm_py.core.kv_memory import PARTS
from xllm_py.transport.base import GiverGrant
from xllm_py.transport.kv_giving import Giving, Givings, Item, frames_of
from xllm_py.wire import codec, kv_session
from xllm_py.wire.codec import FrameType, Header

NAME = (1).to_bytes(16, "big")


class Wrong(AssertionError):
    """The parser let something through, or fell over."""


# ---- frames in process


def header_of(chooser: random.Random) -> Header:
    """As tests/wire/test_kv_fuzz draws them: mostly nearly right."""

    def edge(bits: int) -> int:
        values = [value for value in EDGES if value < 2**bits]
        return chooser.choice(
            (chooser.randrange(5), chooser.choice(values), chooser.randrange(2**bits))
        )

    near = chooser.random() < 0.7
    return Header(
        type=chooser.choice((1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, edge(8))),
        seq=0,
        grant=chooser.randrange(7).to_bytes(16, "big"),
        part=chooser.randrange(2) if near else edge(8),
        layer=chooser.randrange(2) if near else edge(16),
        first=chooser.randrange(4) if near else edge(32),
        num_blocks=chooser.randrange(4) if near else edge(10),
        length=None if chooser.random() < 0.8 else edge(32),  # type: ignore[arg-type]  # None: the right one
        checksum=None if chooser.random() < 0.8 else edge(32),  # type: ignore[arg-type]
    )


def frames(count: int, seed: int) -> dict[str, float]:
    """See the module's text."""
    chooser, slowest, stored = random.Random(seed), 0.0, 0
    hostile = Hostile(patience=50)
    for number in range(count):
        began = time.thread_time()
        if chooser.random() < 0.002:
            hostile.act(("revoke", chooser.randrange(5)))
        elif chooser.random() < 0.02:
            hostile.act(("commit", chooser.randrange(5)))
        else:
            hostile.send(header_of(chooser))
        slowest = max(slowest, time.thread_time() - began)
        if number % 500 == 499 or number == count - 1:
            written = hostile.taker.written()
            stored += len(written)
            if not written <= hostile.allowed:
                raise Wrong(f"frame {number}: blocks {written - hostile.allowed} were written")
            hostile = Hostile(patience=50)
    if slowest > 1.0:
        raise Wrong(f"a frame took {slowest} s of computing")
    return {"frames": count, "slowest_s": round(slowest, 4), "blocks_written": stored}


# ---- flipped bits


class Story:
    """A handoff of two blocks, frame by frame over one link after the other, as transport/tcp_giver does it."""

    def __init__(self) -> None:
        self.taker = Taker()
        self.taker.grants.open(grant(1, (5, 9)))
        self.content = {
            (layer, part): bytes((layer * 40 + part * 20 + i) % 256 for i in range(16))
            for layer in range(LAYOUT.num_layers)
            for part in range(PARTS)
        }
        self.givings = Givings()
        self.givings.add(
            GiverGrant(
                grant=NAME, endpoints=(), peer_incarnation="d", block_size=4, prompt_digest=DIGEST
            )
        )
        for layer in range(LAYOUT.num_layers):
            self.givings.put(frames_of(NAME, layer, 0, (5, 9), 2), 1.0)
        self.givings.put([Item(FrameType.COMMIT, NAME)], 1.0)
        self.bits = 0  # of everything that was sent so far
        self.seen = False  # the flip
        self.links = 0

    def tell(self, flip: int) -> None:
        """To its end; `flip` is the bit that is turned."""
        while NAME in self.givings:
            self.links += 1
            if self.links > 3:
                raise Wrong(f"bit {flip}: one flip broke three links")
            self.over(self.taker.link(), flip)
        for (layer, part), content in self.content.items():
            region = self.taker.memory[layer, part]
            if bytes(region[40:48]) + bytes(region[72:80]) != content:
                raise Wrong(f"bit {flip}: other bytes landed than were sent")
        if self.taker.written() != {5, 9}:
            raise Wrong(f"bit {flip}: blocks {self.taker.written()} were written")

    def over(self, link: Link, flip: int) -> None:
        for giving, item in iter(self.givings.next, None):
            header, payload = self.frame(link, giving, item)
            frame = bytearray(header + payload)
            if self.bits <= flip < self.bits + len(frame) * 8:
                place = flip - self.bits
                frame[place // 8] ^= 1 << place % 8
            self.bits += len(frame) * 8
            answer = self.arrive(
                link, bytes(frame[: codec.HEADER_BYTES]), bytes(frame[codec.HEADER_BYTES :])
            )
            if not self.heard(link, answer):
                self.seen = True
                if self.givings.reopened():
                    raise Wrong(f"bit {flip}: given up")
                return

    def frame(self, link: Link, giving: Giving, item: Item) -> tuple[bytes, bytes]:
        kind = item.kind
        if kind is not FrameType.DATA:
            giving.committed_s = 1.0
            raw = giving.question(link.giver, kind)
            return raw[: codec.HEADER_BYTES], raw[codec.HEADER_BYTES :]
        layer, part = item.layer, item.part
        payload = self.content[layer, part]
        header, raw = link.giver.data(NAME, layer, part, 0, 2, payload_checksum(payload))
        giving.frames.sent(header)
        return raw, payload

    def arrive(self, link: Link, header: bytes, payload: bytes) -> object:
        judged = link.session.on_header(header)
        if isinstance(judged, kv_session.Take) and judged.header.length != len(payload):
            raise Wrong("a length was believed")
        if not isinstance(judged, kv_session.Take):
            return judged
        if judged.store:
            link.write(judged, payload)
        return link.session.on_payload(
            judged, payload_checksum(payload), payload if judged.is_commit else b""
        )

    def heard(self, link: Link, answer: object) -> bool:
        """Whether the link goes on."""
        match answer:
            case kv_session.Landed():
                self.givings.drop(NAME)
            case kv_session.Asked(landed=landed):
                if landed:
                    self.givings.drop(NAME)
                else:
                    self.givings.again(NAME)
            case kv_session.Reject() | kv_session.Closed():
                return False
        return True


def places() -> int:
    """Bits of a handoff in which nothing is flipped."""
    story = Story()
    story.tell(-1)
    return story.bits


def flips(count: int, seed: int) -> dict[str, float]:
    """See the module's text: every place in turn, again and again with frames of other links before it."""
    size, unseen = places(), 0
    for number in range(count):
        story = Story()
        for _ in range(number // size):
            story.taker.link()  # other nonces and keys
        story.tell(number % size)
        unseen += not story.seen
    if unseen:
        raise Wrong(f"{unseen} flips were not seen")
    return {"flips": count, "places": size, "unseen": unseen}


# ---- frames over sockets


def words(chooser: random.Random, link: Link) -> Iterator[bytes]:
    """What an authenticated peer says on one link: some that is right, then something that is not."""
    for _ in range(chooser.randrange(1, 60)):
        block = chooser.randrange(2)
        payload = bytes([block]) * KV_LAYOUT.block_bytes
        header = Header(
            type=FrameType.DATA,
            seq=0,
            grant=NAME,
            layer=chooser.randrange(KV_LAYOUT.num_layers),
            part=chooser.randrange(PARTS),
            first=block,
            num_blocks=1,
            length=len(payload),
            checksum=payload_checksum(payload),
        )
        yield link.forge(header) + payload
    last = header_of(chooser)
    length = last.length if last.length is not None else last.num_blocks * KV_LAYOUT.block_bytes
    length, checksum = min(length, 2**32 - 1), last.checksum if last.checksum is not None else 0
    yield link.forge(last._replace(length=length, checksum=checksum)) + bytes(min(length, 1 << 16))


def socket_frames(count: int, seed: int) -> dict[str, float]:
    """See the module's text."""
    chooser, sent, links, slowest = random.Random(seed), 0, 0, 0.0
    pair = Pair(make_tcp)
    try:
        allowed = (10, 11)
        while sent < count:
            name = pair.grant(allowed)
            began = time.perf_counter()
            sent += one_link(pair, chooser, name)
            slowest = max(slowest, time.perf_counter() - began)
            links += 1
            pair.taker.revoke(name)
            pair.turn()
            pair.taken.clear()
            pair.assert_untouched(but=allowed)
        if max(allowed) >= KV_BLOCKS:
            raise Wrong("the blocks of the grant are not in the cache")
    finally:
        pair.close()
    return {"socket_frames": sent, "links": links, "slowest_link_s": round(slowest, 3)}


def one_link(pair: Pair, chooser: random.Random, name: bytes) -> int:
    """Frames sent until the taker hung up."""
    from tests.transport.test_tcp import RawGiver

    raw = RawGiver(pair.taker.endpoint)
    speaker = Link.__new__(Link)
    speaker.signer, speaker.seq = raw.session._out._signer, 0
    sent = 0
    with raw.sock as sock:
        sock.settimeout(1.0)
        try:
            for word in words(chooser, speaker):
                sock.sendall(
                    word.replace(NAME, name, 1) if name == NAME else resign(speaker, word, name)
                )
                sent += 1
            with contextlib.suppress(OSError):  # it has hung up in this very moment
                sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except ConnectionError:
            pass
    return sent


def resign(speaker: Link, word: bytes, name: bytes) -> bytes:
    """The same word about another grant."""
    header, ours = codec.unpack_header(word[: codec.HEADER_BYTES])
    if not ours or header.grant != NAME:
        return word
    packed = codec.pack_header(header._replace(grant=name), speaker.signer)
    return packed + word[codec.HEADER_BYTES :]


def main() -> None:
    """Command line; one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--flips", type=int, default=100_000)
    parser.add_argument("--socket-frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = (
        (flips, options.flips),
        (socket_frames, options.socket_frames),
        (frames, options.frames),
    )
    for part, count in parts:
        began = time.perf_counter()
        found = part(count, options.seed)
        print(json.dumps({**found, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
