"""Looks at KV links, from the side that connects: a small probe for the round trip, then a large one for the rate. Part of engine/handoff_agent.

Asked for by the API process on a master's word; the answer follows whatever happens, since every probe of the transport ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base import ids
from xllm_py.transport.base import GiverGrant, KvEvent, KvEventKind, KvTransport
from xllm_py.wire import messages as m

SMALL_BYTES = 4 << 10
LARGE_BYTES = 1 << 20


@dataclass(slots=True)
class _Look:
    """At one peer."""

    command: m.Probe
    round_trip_s: float | None = None  # None: the small probe is under way


class ProbingAgent:
    """All looks under way."""

    def __init__(self, *, transport: KvTransport | None, send: Callable[[m.Event], None]) -> None:
        self._transport = transport
        self._send = send
        self._looks: dict[bytes, _Look] = {}

    @property
    def num_open(self) -> int:
        """Looks under way, for the ledger."""
        return len(self._looks)

    def on_probe(self, command: m.Probe, now: float) -> None:
        """Begin."""
        if self._transport is None:
            self._send(m.Probed(call=command.call, reason="this instance has no KV port"))
            return
        self._probe(_Look(command), SMALL_BYTES, self._transport)

    def _probe(self, look: _Look, num_bytes: int, transport: KvTransport) -> None:
        name = ids.grant_id()
        self._looks[name] = look
        transport.probe(
            GiverGrant(
                grant=name,
                endpoints=look.command.endpoints,
                peer_ranks=len(look.command.endpoints),
                peer_incarnation=look.command.incarnation,
                block_size=look.command.block_size,
                prompt_digest=b"",
            ),
            num_bytes,
            fetch=look.command.fetch,
        )

    def on_transport(self, event: KvEvent) -> bool:
        """Take an event of one of our probes; False when it is none."""
        look = self._looks.pop(event.grant, None)
        if look is None or self._transport is None:
            return False
        if event.kind is not KvEventKind.ACKNOWLEDGED:
            self._send(m.Probed(call=look.command.call, reason=event.text))
        elif look.round_trip_s is None:
            look.round_trip_s = event.seconds
            self._probe(look, LARGE_BYTES, self._transport)
        else:
            moving_s = max(event.seconds - look.round_trip_s, 1e-6)
            self._send(
                m.Probed(
                    call=look.command.call,
                    works=True,
                    round_trip_s=look.round_trip_s,
                    bytes_per_s=LARGE_BYTES / moving_s,
                )
            )
        return True
