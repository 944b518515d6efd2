"""Whether this instance can serve now: the reasons behind /ready and /health, from what the engine last said."""

from __future__ import annotations

from xllm_py.base.clock import Clock
from xllm_py.instance.replicas import Engine
from xllm_py.openai.backend import Readiness

_PATIENCE = 3.0  # times the step the engine announced


class Health:
    """Owned by the daemon, which sets `loaded` and `draining`."""

    def __init__(self, engine: Engine, clock: Clock, stalled_after_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._stalled_after_s = stalled_after_s
        self.loaded = False
        self.draining = False

    def step_age_s(self) -> float:
        """Seconds since the engine last said anything, 0 when it has nothing to do."""
        progress = self._engine.progress
        if not progress.waiting + progress.running:
            return 0.0
        return self._clock.now() - self._engine.progress_at

    def moves(self) -> bool:
        """Whether the engine lives and finishes its steps in the time it announced; true also while it is idle."""
        limit_s = self._stalled_after_s + _PATIENCE * self._engine.progress.announced_s
        return not self._engine.down and self.step_age_s() <= limit_s

    def readiness(self) -> Readiness:
        """For /ready."""
        if self._engine.down:
            return Readiness(ready=False, reasons=("engine_down",), details=(self._engine.down,))
        if not self.loaded:
            return Readiness(ready=False, reasons=("loading",))
        if self.draining:
            return Readiness(ready=False, reasons=("draining",))
        if not self.moves():
            return Readiness(ready=False, reasons=("engine_stalled",))
        return Readiness(ready=True)
