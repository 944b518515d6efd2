"""Handoffs as the engine loop sees them: one object with the loop's moments, for both ends.

    on_news -> [schedule] -> before_step -> [execute: layer_done per layer] -> [apply] -> after_step

engine/giving is P's side, engine/taking is D's, engine/probing looks whether a link works; an instance may be all at once. This is the only place where scheduler,
KV transport and peers meet.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm_py.core.config import SchedulerConfig
from xllm_py.core.kv_memory import KvLayout
from xllm_py.core.kv_plan import Ranks
from xllm_py.core.plan import StepPlan
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.giving import GivingAgent
from xllm_py.engine.probing import ProbingAgent
from xllm_py.engine.taking import TakingAgent
from xllm_py.transport.base import KvTransport
from xllm_py.wire import messages as m


class HandoffAgent:
    """Giver and taker of one engine."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        transport: KvTransport | None,
        config: SchedulerConfig,
        model_fingerprint: str,
        layout: KvLayout,
        send: Callable[[m.Event], None],
        ranks: Ranks | None = None,
    ) -> None:
        """layout: with the heads of all ranks. ranks: None: one, reached where the transport listens."""
        self._transport = transport
        ranks = ranks or Ranks()
        self.giving = GivingAgent(
            scheduler=scheduler,
            transport=transport,
            config=config,
            model_fingerprint=model_fingerprint,
            layout=layout,
            send=send,
            ranks=ranks,
        )
        self.taking = TakingAgent(
            scheduler=scheduler,
            transport=transport,
            model_fingerprint=model_fingerprint,
            layout=layout,
            send=send,
            ranks=ranks,
        )
        self.probing = ProbingAgent(transport=transport, send=send)
        self.layer_done = self.giving.layer_done
        self.next_tick = self.giving.next_tick

    @property
    def wake_fds(self) -> list[int]:
        """What the loop's select watches beside the pipe."""
        return [self._transport.wake_fd] if self._transport is not None else []

    def on_news(self, now: float) -> None:
        """Before a step is planned: let go of what ended, take transport events, let timers fire."""
        self.giving.drop_ended(now)
        if self._transport is not None:
            for event in self._transport.poll():
                if not (self.giving.on_transport(event, now) or self.probing.on_transport(event)):
                    self.taking.on_transport(event, now)
        self.giving.on_time(now)

    def on_offers(self, command: m.Offers, now: float) -> None:
        """D: reserve or refuse. What ended here is let go of first: its blocks may be promised to a peer in this very moment."""
        self.giving.drop_ended(now)
        self.taking.on_offers(command, now)

    def on_peer_gone(self, command: m.PeerGone, now: float) -> None:
        """D: the reservations of a giver end. What it has given is ours, and the transport may have said so while a step was computed."""
        self.on_news(now)
        self.taking.on_peer_gone(command, now)

    def before_step(self, plan: StepPlan, now: float) -> None:
        """After a step was planned and before it is computed."""
        self.taking.revoke_ended()
        self.giving.before_step(plan, now)

    def ended(self, now: float) -> None:
        """After a step was applied, before its outputs are told: the word on a handoff goes before the end of its request."""
        self.giving.drop_ended(now)

    def after_step(self, now: float) -> None:
        """After its outputs were told, or when there was no step."""
        self.giving.after_step(now)
        self.taking.revoke_ended()

    def ledger(self) -> dict[str, int]:
        """Handoffs under way and the transport's counts."""
        counts = {
            "giving": self.giving.num_open,
            "taking": self.taking.num_open,
            "probing": self.probing.num_open,
        }
        if self._transport is not None:
            counts |= {f"kv_{name}": count for name, count in self._transport.ledger().items()}
        return counts
