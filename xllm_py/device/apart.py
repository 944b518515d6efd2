"""What devices have in common whose memory is not the host's: tensors are copied there, the cache is mirrored, logits come back to be sampled.

The arithmetic here is plain torch and runs wherever torch does. `cuda` and `npu` put kernels and operators of their own in the place
of most of it. Results are as exact as the libraries behind them: engine/self_test finds out at start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.core.kv_memory import KvMemory
from xllm_py.device import draws
from xllm_py.device.base import (
    AttentionBatch,
    Drawing,
    Head,
    HeadNorms,
    KvShape,
    Linear,
    Quantized,
    RowWise,
    Turn,
)
from xllm_py.device.mirror import PAGEABLE, HostMirror
from xllm_py.device.paged import PagedCache
from xllm_py.device.torch_attention import WindowedAttention
from xllm_py.device.torch_forms import linear8, rms_norm, rotate


class ApartDevice:
    """Implements device.base.Device on a torch device, but for what it is called and how much memory it has."""

    collectives = "gloo"  # over the host, unless the device has its own
    _pinned = PAGEABLE  # likewise

    def __init__(self, at: torch.device) -> None:
        self.name = f"{at.type}:{at.index}"
        self._at = at
        self._cache = PagedCache()
        self._attention = WindowedAttention(self._cache, lambda dtype: dtype)
        self._mirrored: KvMemory | None = None
        self._slots: tuple[Tensor, Tensor] | None = None  # of a step, on the host and here

    def row_padding(self) -> int:
        """See Device."""
        return 1

    def put(self, tensor: Tensor) -> Tensor:
        """See Device."""
        return tensor.to(self._at, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See Device."""
        here = self._pinned.alloc(tensor.shape, tensor.dtype)
        here.copy_(tensor, non_blocking=True)
        wait = self._pinned.mark()

        def told() -> Tensor:
            wait()
            return here

        return told

    # ---- what a model is built of

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        offset = None if bias is None else self.put(bias)
        if isinstance(weight, Quantized):
            return linear8(Quantized(self.put(weight.values), self.put(weight.scales)), offset)
        matrix = self.put(weight)

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = functional.linear(x, matrix, offset)
            return y if residual is None else residual + y

        return linear

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        both = self.pack_linear(weight, bias)

        def gated(x: Tensor) -> Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return functional.silu(gate) * up

        return gated

    def pack_head(self, weight: Tensor) -> Head:
        """See Device."""
        return _Head(self.put(weight))

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        here = self.put(weight)
        return lambda x: rms_norm(x, here, eps)

    def best(self, logits: Tensor) -> Tensor:
        """See Device. Where the logits are: a row of them is as long as the vocabulary, and what comes to the host is two numbers."""
        lowest, highest = logits.aminmax(dim=-1, keepdim=True)
        sound = torch.isfinite(lowest) & torch.isfinite(highest)
        size = logits.shape[1]
        ids = torch.arange(size, device=logits.device)
        first = torch.where(logits == highest, ids, size - 1).amin(dim=-1, keepdim=True)
        return torch.cat([first, sound], dim=-1)

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        """See Device; on the host."""
        if logits.device.type != "cpu":
            logits = logits[torch.tensor([each.row for each in wanted])].cpu()
            wanted = [replace(each, row=place) for place, each in enumerate(wanted)]
        return draws.draw(logits, wanted)

    # ---- the cache

    def alloc_kv(self, shape: KvShape) -> None:
        """See Device."""
        # one block more than asked for: it stays zero, and what lies past the end of a sequence is read from it
        size = (shape.num_blocks + 1, shape.block_size, shape.kv_heads, shape.head_dim)
        try:
            caches = [
                torch.zeros(size, dtype=shape.dtype, device=self._at)
                for _ in range(2 * shape.num_layers)
            ]
        except RuntimeError as error:
            raise DeviceUnavailable(
                f"{self.name}: the KV cache of {shape.num_blocks} blocks could not be allocated; "
                "lower --max_cache_size or --max_memory_utilization"
            ) from error
        self._use(PagedCache(caches[0::2], caches[1::2], shape.block_size, shape.kv_heads))
        lent = [cache[: shape.num_blocks] for cache in caches]
        self._mirrored = HostMirror(lent, self._pinned).memory(shape)

    def _use(self, cache: PagedCache) -> None:
        self._cache = cache
        self._attention = WindowedAttention(cache, lambda dtype: dtype)

    def kv_memory(self) -> KvMemory:
        """See Device."""
        if self._mirrored is None:
            raise DeviceUnavailable("the KV cache is not allocated yet")
        return self._mirrored

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See Device."""
        here, there = self.put(torch.tensor(sources)), self.put(torch.tensor(targets))
        for cache in (*self._cache.keys, *self._cache.values):
            cache.index_copy_(0, there, cache.index_select(0, here))

    def slots_here(self, slots: Tensor) -> Tensor:
        """A step's slots on the device, copied once a step and not once a layer."""
        if self._slots is None or self._slots[0] is not slots:
            self._slots = (slots, self.put(slots))
        return self._slots[1]

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kv_heads, real = self._cache.kv_heads, slots.shape[0]
        turning, plain = mixed[:, :-kv_heads], mixed[:real, -kv_heads:]
        if norms is not None:
            turning = rms_norm(turning, norms.weight, norms.eps)
        turned = rotate(turning, *turn.here)
        at = self.slots_here(slots)
        keys.flatten(0, 1).index_copy_(0, at, turned[:real, -kv_heads:])
        values.flatten(0, 1).index_copy_(0, at, plain)
        return turned[:, :-kv_heads].contiguous()

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        return self._attention.attend(queries, layer, batch, sliding_window)

    def close(self) -> None:
        """See Device."""
        self._use(PagedCache())
        self._mirrored = self._slots = None


class _Head:
    """Implements Head."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """See Head."""
        return functional.linear(x, self._weight).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """See Head."""
        return functional.embedding(token_ids, self._weight)
