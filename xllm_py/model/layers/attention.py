"""Grouped-query attention with rotary positions over the paged cache. Source: Ainslie et al. 2023, GQA; names of the Hugging Face files."""

from __future__ import annotations

import torch
from torch import Tensor

from xllm_py.device.base import AttentionBatch, HeadNorms, Turn
from xllm_py.model.base import Stored
from xllm_py.model.layers.parts import Parts


class Attention:
    """One layer's attention.

    qkv_bias, out_bias: whether the projections in and out have offsets. head_norms: queries and keys are normed, head by head,
    before they are rotated. The layer's sliding window stands in config.windows.
    """

    def __init__(
        self,
        parts: Parts,
        index: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norms: bool = False,
    ) -> None:
        config = parts.config
        self._index = index
        self._device = parts.device
        queries, kv_heads = parts.shard.heads(config)
        self._heads, self._kv_heads = len(queries), len(kv_heads)
        self._is_alone = parts.shard.count == 1
        self._dim, self._window = config.head_dim, config.windows[index]
        at, dim, hidden = f"model.layers.{index}.self_attn", config.head_dim, config.hidden_size
        inner, inner_kv = config.num_heads * dim, config.num_kv_heads * dim
        sizes = {f"{at}.q_proj": inner, f"{at}.k_proj": inner_kv, f"{at}.v_proj": inner_kv}
        mine, mine_kv = _rows(queries, dim), _rows(kv_heads, dim)
        here = {f"{at}.q_proj": mine, f"{at}.k_proj": mine_kv, f"{at}.v_proj": mine_kv}
        self._qkv = parts.linear(sizes, hidden, here=here, bias=qkv_bias)
        self._out = parts.summed(f"{at}.o_proj", hidden, inner, mine, bias=out_bias)
        heads = (self._heads, self._kv_heads)
        self._norms = _head_norms(parts, at, *heads) if head_norms else None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        turn: Turn,
        batch: AttentionBatch,
        stored: Stored | None,
    ) -> Tensor:
        """x: [tokens, hidden], normed; residual: what the result is added to; it has the same shape and dtype."""
        tokens, device = x.shape[0], self._device
        mixed = self._qkv(x).view(tokens, self._heads + 2 * self._kv_heads, self._dim)
        queries = device.rotate_and_store(mixed, self._index, turn, batch.slots, self._norms)
        if stored is not None and self._is_alone:
            stored(self._index)
        attended = device.attend(queries, self._index, batch, self._window)
        result = self._out(attended.view(tokens, self._heads * self._dim), residual)
        if stored is not None and not self._is_alone:
            stored(self._index)  # every rank has written its heads: their sum is here
        return result


def _rows(heads: range, dim: int) -> slice:
    """Of a projection."""
    return slice(heads.start * dim, heads.stop * dim)


def _head_norms(parts: Parts, at: str, num_queries: int, num_keys: int) -> HeadNorms:
    """One norm for the heads of queries and keys, [heads + KV heads, head_dim]; they lie side by side."""
    config, shape = parts.config, (parts.config.head_dim,)
    queries = parts.weights.take(f"{at}.q_norm.weight", shape)
    keys = parts.weights.take(f"{at}.k_norm.weight", shape)
    both = (queries.expand(num_queries, -1), keys.expand(num_keys, -1))
    return HeadNorms(weight=parts.device.put(torch.cat(both)), eps=config.rms_norm_eps)
