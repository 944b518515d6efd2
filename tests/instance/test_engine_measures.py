"""The engine's totals become counters that only grow, whenever somebody asks."""

from __future__ import annotations

from xllm_py.base.metrics import Metrics
from xllm_py.instance.engine_measures import EngineMeasures
from xllm_py.wire.messages import Progress


def told(hit: int) -> Progress:
    return Progress(
        blocks={"free": 3, "cached": 5},
        steps=hit // 10,
        tokens=hit,
        prefix={"prefix_queried_tokens": 100, "prefix_hit_tokens": hit, "prefix_evicted_blocks": 2},
    )


def test_totals_are_counted_once_and_blocks_are_as_last_told() -> None:
    metrics = Metrics()
    last = told(40)
    measures = EngineMeasures(metrics, lambda: last)
    for progress in (told(30), told(30), last):
        measures.on_progress(progress)
    text = metrics.text().decode()
    assert "xllm_prefix_cache_query_tokens_total 100.0" in text
    assert "xllm_prefix_cache_hit_tokens_total 40.0" in text
    assert "xllm_prefix_cache_evicted_blocks_total 2.0" in text
    assert "xllm_engine_steps_total 4.0" in text
    assert "xllm_engine_tokens_total 40.0" in text
    assert 'xllm_kv_blocks{state="cached"} 5.0' in text
    assert 'xllm_kv_blocks{state="staged"} 0.0' in text
