"""One Ascend NPU, through the operators of torch_npu 2.13: fused attention over the paged cache, scatter, norms, swiglu, rotation, int8.

Layouts and limits (the operators' own texts; docs/decisions/0038): the cache is [blocks, block_size, KV heads, head_dim] and is given to attention as
[blocks, block_size, KV heads * head_dim], blocks are multiples of 128 tokens, a step is flat (TND) with the *cumulative* ends of its
sequences and the plain lengths of their contexts, and a causal mask is the upper triangle of 2,048 x 2,048 whatever the lengths. Slots and block numbers are not
checked by the operators: the engine's are right by construction. What is tested without an NPU, and what is not: docs/devices.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.apart import ApartDevice
from xllm_py.device.base import (
    AttentionBatch,
    HeadNorms,
    KvShape,
    Linear,
    Quantized,
    RowWise,
    Turn,
)
from xllm_py.device.mirror import Pinned, pinned_memory
from xllm_py.device.npu.load import choose, load
from xllm_py.device.npu.simulated_operators import VERSION as SIMULATED

BLOCK = 128  # tokens; attention with several queries of a sequence takes blocks of so many, or a multiple
_MASK = 2048
_CAUSAL, _BAND = 3, 4  # sparse_mode


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's sequences as the attention operator wants them; the same for every layer."""

    tables: Tensor  # [sequences, blocks] int32, on the device
    ends: list[int]  # of each sequence's tokens in the step
    contexts: list[int]


class NpuDevice(ApartDevice):
    """Implements device.base.Device. Raises DeviceUnavailable with cause and fix."""

    def __init__(self, index: int) -> None:
        self._ops: Any = load(f"npu:{index}")
        self._npu: Any = torch.npu  # type: ignore[attr-defined]  # there once the module is loaded
        super().__init__(choose(self._npu, index))
        if self._ops.__version__ != SIMULATED:
            self.collectives = "hccl"
            stream, copies = self._npu.current_stream(self._at), self._npu.Stream(self._at)

            def aside() -> Any:
                copies.wait_stream(stream)
                return self._npu.stream(copies)

            self._pinned = Pinned(
                pinned_memory,
                stream.synchronize,
                lambda: self._npu.current_stream(self._at).record_event().synchronize,
                aside,
            )
        self._mask = self.put(torch.ones(_MASK, _MASK, dtype=torch.int8).triu(1))
        self._step: tuple[AttentionBatch, _Step] | None = None

    def memory(self) -> tuple[int, int]:
        """See Device."""
        free, total = self._npu.mem_get_info(self._at)
        return int(free), int(total)

    def variant(self) -> str:
        """See Device."""
        name = self._npu.get_device_name(self._at)
        return f"npu {name} torch_npu {self._ops.__version__}"

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        if not isinstance(weight, Quantized):
            return super().pack_linear(weight, bias)
        ops, offset = self._ops, None if bias is None else self.put(bias)
        matrix, scales = self.put(weight.values.t().contiguous()), self.put(weight.scales)

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            values, peaks = ops.npu_dynamic_quant(x)
            y = ops.npu_quant_matmul(
                values, matrix, scales, pertoken_scale=peaks, output_dtype=x.dtype
            )
            y = y if offset is None else y + offset
            result: Tensor = y if residual is None else residual + y
            return result

        return linear

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        both, swiglu = self.pack_linear(weight, bias), self._ops.npu_swiglu
        return lambda x: swiglu(both(x), dim=-1)

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        here, rms_norm = self.put(weight), self._ops.npu_rms_norm
        return lambda x: rms_norm(x, here, epsilon=eps)[0]

    def alloc_kv(self, shape: KvShape) -> None:
        """See Device."""
        if shape.block_size % BLOCK:
            raise DeviceUnavailable(
                f"{self.name}: attention wants blocks of {BLOCK} tokens or a multiple; "
                f"pass --block_size={BLOCK}"
            )
        super().alloc_kv(shape)

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        kv_heads, real = self._cache.kv_heads, slots.shape[0]
        heads = mixed.shape[1] - 2 * kv_heads
        queries, keys = mixed[:, :heads], mixed[:, heads : heads + kv_heads]
        if norms is not None:
            rms_norm = self._ops.npu_rms_norm
            # all heads of a kind have one weight
            queries = rms_norm(queries.contiguous(), norms.weight[0], epsilon=norms.eps)[0]
            keys = rms_norm(keys.contiguous(), norms.weight[heads], epsilon=norms.eps)[0]
        cos, sin = (each.unsqueeze(0) for each in turn.here)
        turned: Tensor = self._ops.npu_rotary_mul(queries.unsqueeze(0).contiguous(), cos, sin)[0]
        keys = self._ops.npu_rotary_mul(keys.unsqueeze(0).contiguous(), cos, sin)[0]
        self._ops.npu_scatter_pa_kv_cache(
            keys[:real].contiguous(),
            mixed[:real, heads + kv_heads :].contiguous(),
            self._cache.keys[layer],
            self._cache.values[layer],
            self.slots_here(slots),
            cache_mode="Norm",
        )
        return turned

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        step, real = self._of_step(batch), batch.slots.shape[0]
        heads, dim = queries.shape[1:]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        window = {"pre_tokens": sliding_window - 1, "next_tokens": 0} if sliding_window else {}
        result: Tensor = self._ops.npu_fused_infer_attention_score(
            queries[:real].contiguous(),
            keys.view(*keys.shape[:2], -1),
            values.view(*values.shape[:2], -1),
            atten_mask=self._mask,
            actual_seq_lengths=step.ends,
            actual_seq_lengths_kv=step.contexts,
            block_table=step.tables,
            num_heads=heads,
            num_key_value_heads=self._cache.kv_heads,
            scale=dim**-0.5,
            input_layout="TND",
            block_size=self._cache.block_size,
            sparse_mode=_BAND if sliding_window else _CAUSAL,
            **window,
        )[0]
        padding = queries.shape[0] - real
        return result if not padding else torch.cat((result, result.new_zeros(padding, heads, dim)))

    def _of_step(self, batch: AttentionBatch) -> _Step:
        if self._step is None or self._step[0] is not batch:
            ends = (batch.first_tokens + batch.num_tokens).tolist()
            found = _Step(self.put(batch.block_tables), ends, batch.context_tokens.tolist())
            self._step = (batch, found)
        return self._step[1]

    def slots_here(self, slots: Tensor) -> Tensor:
        """See ApartDevice; the operator takes int32."""
        if self._slots is None or self._slots[0] is not slots:
            self._slots = (slots, self.put(slots.int()))
        return self._slots[1]

    def close(self) -> None:
        """See Device."""
        super().close()
        self._step = None
        self._npu.empty_cache()
