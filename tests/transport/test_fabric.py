"""Payloads through an engine for fabrics, with one that lives in this process."""

from __future__ import annotations

import builtins
import contextlib
import socket
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.conformance.kv_pair import FakeEnd, FakeFabric, Pair, make_tcp
from tests.transport.test_tcp import identity, read, until
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import UsageError
from xllm_py.transport import fabric
from xllm_py.transport.base import KvEventKind
from xllm_py.transport.fabric import FabricReader, FabricWriter
from xllm_py.transport.payload_ring import RING_BYTES, Memory
from xllm_py.transport.tcp_socket import LinkBroken, split_endpoint
from xllm_py.wire import codec
from xllm_py.wire.codec import Payloads
from xllm_py.wire.kv_grants import GrantTable
from xllm_py.wire.kv_handshake import Peer
from xllm_py.wire.kv_taker import TakerSession


@pytest.fixture
def engine() -> FakeFabric:
    return FakeFabric()


def pair_of(giver: FakeFabric | None, taker: FakeFabric | None) -> Pair:
    return Pair(
        lambda **made: make_tcp(fabric=taker if made["incarnation"] == "d-1" else giver, **made)
    )


def land(pair: Pair) -> None:
    pair.wipe((10, 11))
    grant = pair.grant((10, 11))
    pair.give(grant, (1, 2))
    pair.given_event(KvEventKind.ACKNOWLEDGED, grant)
    pair.assert_copied((1, 2), (10, 11))


def test_both_sides_have_to_want_it(engine: FakeFabric) -> None:
    for giver, taker in ((engine, None), (None, engine), (engine, engine)):
        pair = pair_of(giver, taker)
        land(pair)
        assert bool(engine.landings) == (giver is taker)
        pair.close()
        assert not engine.landings


def test_a_peer_gets_nothing_to_write_into_but_the_ring_of_its_link(engine: FakeFabric) -> None:
    pair = pair_of(engine, engine)
    land(pair)
    (memory,) = engine.landings.values()
    assert memory.view.nbytes == RING_BYTES
    memory.view[:] = b"\xee" * RING_BYTES
    pair.assert_copied((1, 2), (10, 11))
    pair.assert_untouched(but=(10, 11))
    pair.close()


def test_what_was_spoilt_in_the_ring_is_seen_and_comes_again(engine: FakeFabric) -> None:
    write, calls = FakeEnd.write, []

    def spoiling(self: FakeEnd, place: int, length: int) -> None:
        write(self, place, length)
        calls.append(length)
        if len(calls) == 2:
            engine.landings[self.description].view[place] ^= 1

    pair = pair_of(engine, engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEnd, "write", spoiling)
        land(pair)
    assert pair.taker.ledger()["frames_rejected"] == 1
    pair.close()


def test_an_engine_that_fails_breaks_the_link_and_at_last_the_grant(engine: FakeFabric) -> None:
    pair = pair_of(engine, engine)
    engine.broken = True
    grant = pair.grant((10, 11))
    pair.give(grant, (1, 2))
    assert "nobody lands" in pair.given_event(KvEventKind.FAILED, grant).text
    engine.broken = False
    land(pair)
    pair.close()


def test_more_than_the_ring_holds_goes_through_it(engine: FakeFabric) -> None:
    reader = FabricReader(engine)
    writer = FabricWriter(engine, reader.description)
    size = 3 << 20
    for turn in range(20):
        payload = bytes([turn]) * size
        assert writer.has_room(size)
        with writer.place(size) as room:
            room[:] = payload
        writer.send()
        with reader.take(size) as found:
            assert found == payload
        taken = reader.news()
        assert taken is not None
        writer.taken(taken)
    with pytest.raises(LinkBroken, match="never there"):
        writer.taken(1 << 62)
    for end in (writer, reader, writer, reader):
        end.close()


def test_a_landing_that_nobody_signed_is_refused(engine: FakeFabric) -> None:
    """By a giver that a taker called: after PROOF it gets an envelope of somebody else."""
    pair = Pair(lambda **made: make_tcp(fabric=engine, **made), pull=True)
    for envelope in (codec.pack_landing(b"x", codec.Signer(b"?" * 32)), b"????" + bytes(40)):
        mine = replace(identity("d-1"), payloads=Payloads.NIXL)
        taker = TakerSession(mine, GrantTable(), calls=Peer("p-1"))
        with socket.create_connection(split_endpoint(pair.giver.endpoint), 10.0) as sock:
            sock.sendall(taker.call())
            welcome = taker.on_hello(read(sock, codec.HELLO_BYTES))
            assert isinstance(welcome, bytes)
            sock.sendall(welcome)
            assert taker.on_proof(read(sock, codec.PROOF_BYTES)) is None
            sock.sendall(envelope)
            with contextlib.suppress(ConnectionResetError):  # it did not read all of it
                assert read(sock, 1) == b""
    until("the count", lambda: pair.giver.ledger()["frames_rejected"] == 2)
    pair.close()


def test_an_engine_that_is_not_installed_is_named_with_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] in ("nixl_cu12", "mooncake"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("nixl", "mooncake"):
        monkeypatch.delitem(sys.modules, f"xllm_py.transport.fabric_{name}", raising=False)
        with pytest.raises(UsageError, match=rf"pip install 'xllm_py\[{name}\]'"):
            fabric.open_fabric(name, "127.0.0.1", RealClock())


def test_a_memory_stays_where_it_is_and_goes_once() -> None:
    memory = Memory()
    memory.view[:3] = b"abc"
    assert memory.address
    memory.close()
    memory.close()
