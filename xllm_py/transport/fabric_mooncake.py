"""Mooncake's transfer engine as a Fabric, peer to peer, over TCP or what it finds of RDMA. Made by transport/fabric."""

from __future__ import annotations

import os
import threading

from mooncake.engine import TransferEngine

from xllm_py.base.errors import StartError
from xllm_py.transport.payload_ring import RING_BYTES, Memory
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.wire.codec import Payloads

_ADDRESS_BYTES = 8


class Mooncake:
    """See Fabric. One engine a process; MC_PROTOCOL is tcp (the default) or rdma, MC_DEVICE the device of it."""

    payloads = Payloads.MOONCAKE

    def __init__(self, host: str) -> None:
        """Raises StartError."""
        self._engine = TransferEngine()
        protocol, device = os.environ.get("MC_PROTOCOL", "tcp"), os.environ.get("MC_DEVICE", "")
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code:
            raise StartError(f"mooncake does not start on {host} with {protocol}: code {code}")
        self._name = f"{host}:{self._engine.get_rpc_port()}"
        self._lock = threading.Lock()  # around what changes the engine's list of memories

    def land(self, memory: Memory) -> _Held:
        """See Fabric."""
        place = memory.address.to_bytes(_ADDRESS_BYTES, "little")
        return _Held(self._engine, memory, self._lock, place + self._name.encode())

    def route(self, memory: Memory, description: bytes) -> _Route:
        """See Fabric."""
        return _Route(self._engine, memory, self._lock, description)


class _Held:
    """A memory that the engine knows."""

    def __init__(
        self, engine: TransferEngine, memory: Memory, lock: threading.Lock, description: bytes
    ) -> None:
        self.description = description
        self._engine, self._address, self._lock = engine, memory.address, lock
        self._known = True
        with lock:
            code = engine.register_memory(memory.address, RING_BYTES)
        if code:
            raise LinkBroken(f"mooncake does not take our memory: code {code}")

    def close(self) -> None:
        """Idempotent."""
        if self._known:
            self._known = False
            with self._lock:
                self._engine.unregister_memory(self._address)


class _Route(_Held):
    def __init__(
        self, engine: TransferEngine, memory: Memory, lock: threading.Lock, description: bytes
    ) -> None:
        super().__init__(engine, memory, lock, description)
        self._to = int.from_bytes(description[:_ADDRESS_BYTES], "little")
        try:
            self._peer = description[_ADDRESS_BYTES:].decode()
        except UnicodeDecodeError as error:
            self.close()
            raise LinkBroken("the peer's mooncake has no name") from error

    def write(self, place: int, length: int) -> None:
        """See Route."""
        code = self._engine.transfer_sync_write(
            self._peer, self._address + place, self._to + place, length
        )
        if code:
            raise LinkBroken(f"mooncake: the write failed with code {code}")
