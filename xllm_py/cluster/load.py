"""What an instance reports about its work: queue and memory (Load), and how its steps advance (Progress).

Travels in every heartbeat; read by membership (progress), by routing (load) and by the status routes. Plain numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Queue and KV memory at one moment."""

    waiting_requests: int = 0
    running_requests: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    reserved_blocks: int = 0
    oldest_wait_s: float = 0.0  # this and the next two are not measured yet
    recent_max_ttft_s: float = 0.0
    recent_max_tbt_s: float = 0.0

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0 to 1; 0 before the number of blocks is known."""
        return 1 - self.free_blocks / self.total_blocks if self.total_blocks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The engine's own counters, the third witness of life beside the card and the connection."""

    steps: int = 0
    tokens: int = 0
    step_age_s: float = 0.0  # since the engine last said anything, on the instance's clock
    announced_s: float = 0.0  # a generous estimate of the step that runs now
