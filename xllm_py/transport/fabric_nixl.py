"""NIXL as a Fabric: one agent for each end of a link, over whatever UCX finds (UCX_TLS, UCX_NET_DEVICES). Made by transport/fabric."""

from __future__ import annotations

import secrets
import time
from typing import Any

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.transport import tcp_socket
from xllm_py.transport.payload_ring import RING_BYTES, Memory
from xllm_py.transport.tcp_socket import LinkBroken
from xllm_py.wire.codec import Payloads

with log.kept():
    from nixl_cu12 import _bindings
    from nixl_cu12._api import nixl_agent, nixl_agent_config

_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    _bindings.nixlBackendError,
    _bindings.nixlInvalidParamError,
    _bindings.nixlMismatchError,
    _bindings.nixlNotAllowedError,
    _bindings.nixlNotFoundError,
    _bindings.nixlNotSupportedError,
    _bindings.nixlRemoteDisconnectError,
    _bindings.nixlUnknownError,
)
_ADDRESS_BYTES = 8
_SPINS = 200  # looks at a transfer before each next one sleeps
_SLEEP_S = 0.00005


class Nixl:
    """See Fabric."""

    payloads = Payloads.NIXL

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def land(self, memory: Memory) -> _Landing:
        """See Fabric."""
        return _Landing(memory)

    def route(self, memory: Memory, description: bytes) -> _Route:
        """See Fabric."""
        return _Route(memory, description, self._clock)


class _Registered:
    """An agent with one memory."""

    def __init__(self, memory: Memory) -> None:
        try:
            self.agent: Any = nixl_agent(
                f"xllm-{secrets.token_hex(8)}", nixl_agent_config(backends=["UCX"])
            )
            self._held: Any = self.agent.register_memory(
                [(memory.address, RING_BYTES, 0, "")], "DRAM"
            )
        except _ERRORS as error:
            raise LinkBroken(f"nixl does not take our memory: {error}") from error

    def close(self) -> None:
        """Idempotent."""
        if self._held is not None:
            self.agent.deregister_memory(self._held)
            self._held = self.agent = None


class _Landing(_Registered):
    """The address, then the agent's own words."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        words: bytes = self.agent.get_agent_metadata()
        self.description = memory.address.to_bytes(_ADDRESS_BYTES, "little") + words


class _Route(_Registered):
    def __init__(self, memory: Memory, description: bytes, clock: Clock) -> None:
        super().__init__(memory)
        self._clock = clock
        self._from = memory.address
        self._to = int.from_bytes(description[:_ADDRESS_BYTES], "little")
        try:
            peer = self.agent.add_remote_agent(description[_ADDRESS_BYTES:])
        except _ERRORS as error:
            self.close()
            raise LinkBroken(f"nixl does not know the peer: {error}") from error
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def write(self, place: int, length: int) -> None:
        """See Route."""
        agent = self.agent
        try:
            here = agent.get_xfer_descs([(self._from + place, length, 0)], "DRAM")
            there = agent.get_xfer_descs([(self._to + place, length, 0)], "DRAM")
            handle = agent.initialize_xfer("WRITE", here, there, self._peer)
        except _ERRORS as error:
            raise LinkBroken(f"nixl cannot write: {error}") from error
        try:
            self._finish(handle)
        finally:
            agent.release_xfer_handle(handle)

    def _finish(self, handle: Any) -> None:
        state, looks = self.agent.transfer(handle), 0
        until = self._clock.now() + tcp_socket.STALL_S
        while state == "PROC":
            looks += 1
            if looks > _SPINS:
                time.sleep(_SLEEP_S)
            if self._clock.now() > until:
                raise LinkBroken("nixl: the peer takes no bytes")
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise LinkBroken(f"nixl: the transfer ended as {state}")
