"""Payloads through an engine for RDMA fabrics (nixl, mooncake) beside the link's socket. Used by tcp_handshake.

The engine's one-sided writes know no grants, so they get nothing to write into but a ring of this link (transport/payload_ring): the
taker registers that memory alone, never its cache, and says where it is after the handshake. Headers, grants, checks, COMMIT and
acknowledgement stay on the socket; a header leaves when the write has arrived, and the taker copies into the blocks that the grant
names. A peer that writes elsewhere, or late, spoils its own payloads, which the checksums show.
"""

from __future__ import annotations

from typing import Protocol

from xllm_py.base.clock import Clock
from xllm_py.base.errors import UsageError
from xllm_py.transport.payload_ring import Incoming, Memory, Outgoing
from xllm_py.wire.codec import Payloads


class Landing(Protocol):
    """Memory of ours that one peer writes into."""

    @property
    def description(self) -> bytes:
        """What the peer needs to know."""
        ...

    def close(self) -> None:
        """Nothing can be written any more; idempotent."""
        ...


class Route(Protocol):
    """To the landing of a peer, from memory of ours."""

    def write(self, place: int, length: int) -> None:
        """Have these bytes at the same place there when this returns. Raises LinkBroken."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Fabric(Protocol):
    """One engine."""

    payloads: Payloads

    def land(self, memory: Memory) -> Landing:
        """Let a peer write there. Raises LinkBroken."""
        ...

    def route(self, memory: Memory, description: bytes) -> Route:
        """Raises LinkBroken."""
        ...


def open_fabric(name: str, host: str, clock: Clock) -> Fabric:
    """The engine of --kv_transport=nixl or mooncake. Raises UsageError when its package or a library of it is missing."""
    try:
        if name == "nixl":
            from xllm_py.transport.fabric_nixl import Nixl

            return Nixl(clock)
        from xllm_py.transport.fabric_mooncake import Mooncake

        return Mooncake(host)
    except ImportError as error:
        raise UsageError(
            f"--kv_transport={name} cannot be used: {error}. Run pip install 'xllm_py[{name}]' and install the library it "
            "names, or use tcp"
        ) from error


class FabricWriter(Outgoing):
    """The giver's end: payloads are put together in our memory and written from there."""

    def __init__(self, fabric: Fabric, description: bytes) -> None:
        """Raises LinkBroken."""
        self._memory = Memory()
        super().__init__(self._memory.view)
        try:
            self._route = fabric.route(self._memory, description)
        except BaseException:
            self._memory.close()
            raise

    def send(self) -> None:
        """See PayloadWriter."""
        _, place, end = self._held[-1]
        self._route.write(place, end - place)

    def close(self) -> None:
        """See PayloadWriter."""
        self._route.close()
        self._memory.close()


class FabricReader(Incoming):
    """The taker's end."""

    def __init__(self, fabric: Fabric) -> None:
        """Raises LinkBroken."""
        self._memory = Memory()
        super().__init__(self._memory.view)
        try:
            self._landing = fabric.land(self._memory)
        except BaseException:
            self._memory.close()
            raise

    @property
    def description(self) -> bytes:
        """What the giver needs to know."""
        return self._landing.description

    def close(self) -> None:
        """See PayloadReader."""
        self._landing.close()
        self._memory.close()
