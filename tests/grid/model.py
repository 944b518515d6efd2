"""A real executor for the grid: so many blocks of KV for whatever model a folder holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from xllm_py.core.config import EngineConfig
from xllm_py.core.executor import Executor
from xllm_py.engine.ranks import open_executor

_FLOAT32_BYTES = 4


def make(config: EngineConfig, num_blocks: int) -> Executor:
    """One rank with one thread, in float32."""
    model = json.loads((Path(config.model_path) / "config.json").read_bytes())
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * head_dim
    size = num_blocks * config.cache.block_size * per_token * _FLOAT32_BYTES
    cache = dataclasses.replace(config.cache, max_cache_bytes=size)
    executor = open_executor(dataclasses.replace(config, cache=cache))
    assert executor.capacity().num_blocks == num_blocks
    return executor
