"""The door's metrics (SPEC 7.8)."""

from __future__ import annotations

from collections.abc import Callable

from xllm_py.base.metrics import Children, Metrics
from xllm_py.openai.key_check import OPEN_PATHS

_PROBED = OPEN_PATHS | {"/metrics"}


class Measures:
    """Counters and histograms of one HTTP door."""

    def __init__(self, metrics: Metrics, num_open: Callable[[], float]) -> None:
        requests = metrics.counter("requests", "HTTP requests by status, probes aside", ("code",))
        probes = metrics.counter(
            "probes", "Requests for /health, /ready and /metrics by status", ("code",)
        )
        rejected = metrics.counter(
            "requests_rejected", "Requests refused before they reached an engine", ("reason",)
        )
        self._requests = Children(lambda code: requests.labels(code).inc)
        self._probes = Children(lambda code: probes.labels(code).inc)
        self._rejected = Children(lambda reason: rejected.labels(reason).inc)
        open_now = metrics.gauge("num_concurrent_requests", "Open generations, streams included")
        open_now.set_function(num_open)
        self.first_token = metrics.seconds(
            "time_to_first_token_seconds", "From arrival to the first token"
        ).observe
        self.between_tokens = metrics.seconds(
            "inter_token_latency_seconds", "Per token, one observation for each delta"
        ).observe
        self.end_to_end = metrics.seconds(
            "e2e_request_latency_seconds", "From arrival to the last token"
        ).observe
        self.prompt_tokens = metrics.counter("prompt_tokens", "Prompt tokens accepted").inc
        self.generation_tokens = metrics.counter("generation_tokens", "Tokens generated").inc
        self.cached_tokens = metrics.counter(
            "cached_prompt_tokens", "Prompt tokens that were not computed"
        ).inc
        self.ignored_fields = metrics.counter(
            "ignored_fields", "Body fields that were stripped because nobody knows them"
        ).inc
        self.loop_lag = metrics.seconds(
            "event_loop_lag_seconds", "How late a timer of the event loop fires"
        ).observe

    def on_answered(self, path: str, status: int) -> None:
        """One request has been answered. A starting cluster says 503 to its probes, and nobody asked it for anything."""
        counters = self._probes if path in _PROBED else self._requests
        counters[str(status)]()

    def on_rejected(self, reason: str) -> None:
        """One generation was refused with an error code."""
        self._rejected[reason]()
