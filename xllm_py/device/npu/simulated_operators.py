"""torch_npu 2.13's operators that are used here, with its schemas word for word, over small host kernels.

A wrong name, keyword, type, layout or order of arguments fails here as it would there; so does what the operators' texts forbid and the hardware
may let pass in silence: slots outside the cache or twice, blocks that do not exist, tensors that are not contiguous. Attention is the exact form
of device/torch_attention, so that a simulated npu keeps the promise of equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from xllm_py.device.base import AttentionBatch
from xllm_py.device.paged import PagedCache
from xllm_py.device.torch_attention import WindowedAttention
from xllm_py.device.torch_forms import rms_norm, rotate, silu

_SCHEMAS = (
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? atten_mask=None, "
    "SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None, Tensor? quant_scale1=None, "
    "Tensor? dequant_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? antiquant_scale=None, "
    "Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? kv_padding_size=None, "
    "Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, "
    "Tensor? key_rope=None, Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, '
    "int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, *, "
    "Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, Tensor? seq_lens=None, str? cache_mode='PA_NZ') -> ()",
    "npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_swiglu(Tensor self, int dim=-1) -> Tensor",
    "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? bias=None, "
    "int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, "
    "int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
)
VERSION = "simulated"  # where a real torch_npu has its number
_MASK = 2048
_CAUSAL, _BAND = 3, 4
_BLOCK = 128
_MOST_GROUP = 64  # query heads of a KV head
_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # as the operators number them


def define(libraries: list[Any]) -> list[str]:
    """Under torch.ops.npu; their names. libraries: takes what has to live as long as the operators."""
    library: Any = Library  # untyped in torch
    schemas, kernels = library("npu", "DEF"), library("npu", "IMPL")
    libraries.extend((schemas, kernels))
    for schema in _SCHEMAS:
        schemas.define(schema)
    names = [schema.partition("(")[0] for schema in _SCHEMAS]
    for name in names:
        kernels.impl(name, _completed(getattr(torch.ops.npu, name).default, _KERNELS[name]), "CPU")
    return names


def _completed(operator: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """With the schema's defaults, which torch leaves out."""
    defaults = {
        each.name: each.default_value for each in operator._schema.arguments if each.kwarg_only
    }
    return lambda *args, **kwargs: kernel(*args, **{**defaults, **kwargs})


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def _attention(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """TND queries over a paged cache [blocks, block_size, KV heads * head_dim]."""
    heads, kv_heads = given["num_heads"], given["num_key_value_heads"]
    tables, size, mask = given["block_table"], given["block_size"], given["atten_mask"]
    ends, contexts = given["actual_seq_lengths"], given["actual_seq_lengths_kv"]
    _need(given["input_layout"] == "TND", "only TND is simulated")
    _need(query.dim() == 3 and query.shape[1] == heads, "TND queries are [tokens, heads, dim]")
    _need(all(each.is_contiguous() for each in (query, key, value)), "not contiguous")
    _need(heads % kv_heads == 0 and heads // kv_heads <= _MOST_GROUP, "heads and KV heads")
    _need(tables.dtype is torch.int32 and tables.dim() == 2, "block_table is 2-D int32")
    _need(size % _BLOCK == 0 and key.shape[1] == size, "block_size of the cache, a multiple of 128")
    _need(len(ends) == len(contexts) == len(tables), "as many ends, contexts and tables")
    _need(ends == sorted(ends) and ends[-1] == len(query), "ends are cumulative")
    _need(bool(((tables >= 0) & (tables < len(key))).all()), "a block that does not exist")
    triangle = torch.ones(_MASK, _MASK, dtype=torch.bool).triu(1)
    _need(
        mask is not None and mask.dtype in (torch.int8, torch.bool) and mask.bool().equal(triangle),
        "causal attention wants the upper triangle of 2048 x 2048, int8 or bool",
    )
    mode, window = given["sparse_mode"], 0
    _need(mode in (_CAUSAL, _BAND), "only sparse_mode 3 and 4 are simulated")
    if mode == _BAND:
        _need(given["next_tokens"] == 0, "a causal band has no next tokens")
        window = given["pre_tokens"] + 1
    scaled = query * (given["scale"] / query.shape[2] ** -0.5)
    parts = [
        _one_sequence(scaled[begin:end], (key, value), kv_heads, table, context, window)
        for (begin, end), context, table in zip(pairwise([0, *ends]), contexts, tables, strict=True)
    ]
    return torch.cat(parts), query.new_zeros(0)


def _one_sequence(
    queries: Tensor,
    cache: tuple[Tensor, Tensor],
    kv_heads: int,
    table: Tensor,
    context: int,
    window: int,
) -> Tensor:
    """Over its blocks alone, side by side, with one of zeros behind them."""
    size, count = cache[0].shape[1], len(queries)
    held = table[: -(-context // size)].long()
    keys, values = (
        torch.cat((part[held], part.new_zeros(1, *part.shape[1:]))).view(
            len(held) + 1, size, kv_heads, -1
        )
        for part in cache
    )
    batch = AttentionBatch(
        block_tables=torch.arange(len(held), dtype=torch.int32)[None],
        first_tokens=torch.tensor([0]),
        num_tokens=torch.tensor([count]),
        context_tokens=torch.tensor([context]),
        slots=torch.arange(context - count, context),
    )
    paged = PagedCache([keys], [values], size, kv_heads)
    return WindowedAttention(paged, lambda _: torch.float32).attend(queries, 0, batch, window)


def _scatter(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    **given: Any,
) -> None:
    _need(given["cache_mode"] == "Norm", "the cache is laid out for cache_mode Norm")
    _need(all(t.is_contiguous() for t in (key, value, key_cache, value_cache)), "not contiguous")
    slots = slot_mapping.long()
    _need(len(slots) == len(key) == len(value), "as many slots as tokens")
    room = key_cache.shape[0] * key_cache.shape[1]
    _need(bool(((slots >= 0) & (slots < room)).all()), "a slot that does not exist")
    _need(len(torch.unique(slots)) == len(slots), "a slot that is written twice")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


def _rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _need(self.dtype is gamma.dtype and gamma.shape == self.shape[-1:], "gamma is of the last size")
    _need(self.is_contiguous(), "not contiguous")
    return rms_norm(self, gamma, epsilon), self.new_zeros(0)


def _swiglu(self: Tensor, dim: int = -1) -> Tensor:
    gate, up = self.chunk(2, dim=dim)
    return silu(gate.contiguous()) * up


def _rotary_mul(
    self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate_by: Tensor | None = None
) -> Tensor:
    _need(self.dim() == r1.dim() == r2.dim() == 4, "npu_rotary_mul is 4-D only")
    _need(rotary_mode == "half" and rotate_by is None, "only halves are simulated")
    return rotate(self[0], r1[0], r2[0])[None]


def _dynamic_quant(input: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    wide = input.float()
    peaks = wide.abs().amax(-1, keepdim=True)
    steps = (torch.tensor(127.0) / peaks).nan_to_num(0.0, posinf=0.0)
    return (wide * steps).round().to(torch.int8), peaks[..., 0] / 127.0


def _quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, **given: Any) -> Tensor:
    _need(x1.dtype is torch.int8 and x2.dtype is torch.int8, "both operands are int8")
    _need(scale.shape == x2.shape[1:], "one scale a column")
    peaks: Tensor = given["pertoken_scale"]
    y = torch._int_mm(x1, x2).float() * scale * peaks[:, None]
    dtype: torch.dtype = _DTYPES[given["output_dtype"]]
    return y.to(dtype)


_KERNELS: dict[str, Callable[..., Any]] = {
    "npu_fused_infer_attention_score": _attention,
    "npu_scatter_pa_kv_cache": _scatter,
    "npu_rms_norm": _rms_norm,
    "npu_swiglu": _swiglu,
    "npu_rotary_mul": _rotary_mul,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quant_matmul": _quant_matmul,
}
