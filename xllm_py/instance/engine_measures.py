"""The engine's numbers in /metrics (SPEC 7.8): read from what it last said, when somebody asks.

Made once by instance/parts. The engine counts in totals and may not go back; a counter here grows by what came since the last word.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm_py.base.metrics import Metrics
from xllm_py.wire import messages as m

# the engine's name, ours, and what it counts
_COUNTERS = (
    ("prefix_queried_tokens", "query_tokens", "Tokens that were looked for in the prefix cache"),
    ("prefix_hit_tokens", "hit_tokens", "Tokens that the prefix cache had"),
    ("prefix_queried_blocks", "query_blocks", "Full blocks looked for in the prefix cache"),
    ("prefix_hit_blocks", "hit_blocks", "Blocks that the prefix cache had"),
    ("prefix_evicted_blocks", "evicted_blocks", "Cached blocks that gave way to others"),
)
_BLOCKS = "KV blocks by what they are used for"


class EngineMeasures:
    """Counters and gauges of one engine."""

    def __init__(self, metrics: Metrics, progress: Callable[[], m.Progress]) -> None:
        """progress: the engine's last word, for the gauges."""
        self._counters = {
            told: metrics.counter(f"prefix_cache_{name}", text) for told, name, text in _COUNTERS
        }
        self._seen = dict.fromkeys(self._counters, 0)
        self._steps = metrics.counter("engine_steps", "Steps that the engine has computed")
        self._tokens = metrics.counter("engine_tokens", "Tokens of answers that it has sampled")
        self._told = m.Progress()
        blocks = metrics.gauge("kv_blocks", _BLOCKS, ("state",))
        for state in ("free", "active", "cached", "staged", "quarantined"):
            blocks.labels(state).set_function(_reader(progress, state))

    def on_progress(self, progress: m.Progress) -> None:
        """The engine has spoken."""
        self._steps.inc(max(0, progress.steps - self._told.steps))
        self._tokens.inc(max(0, progress.tokens - self._told.tokens))
        self._told = progress
        for name, total in progress.prefix.items():
            self._counters[name].inc(total - self._seen[name])
            self._seen[name] = total


def _reader(progress: Callable[[], m.Progress], state: str) -> Callable[[], float]:
    return lambda: progress().blocks.get(state, 0)
