"""The cpu device: memory, the paged cache, and one of two sets of kernels, native or torch's.

Native kernels are compiled at first use; where no compiler is, torch computes, and a line of the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xllm_py.base import log, process
from xllm_py.base.errors import DeviceUnavailable
from xllm_py.core.kv_memory import KvMemory
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
from xllm_py.device.cpu.native.build import build, instruction_sets
from xllm_py.device.cpu.native.library import Library
from xllm_py.device.cpu.native_kernels import NativeKernels
from xllm_py.device.cpu.torch_kernels import TorchKernels
from xllm_py.device.mirror import kv_layout, regions_of
from xllm_py.device.paged import PagedCache

AUTO, TORCH = "auto", "torch"

_log = log.get(__name__)


class Kernels(Protocol):
    """The part of Device that is arithmetic, over a cache that is given."""

    def use(self, cache: PagedCache) -> None:
        """From now on `rotate_and_store` and `attend` work on this cache."""
        ...

    def variant(self) -> str:
        """See Device."""
        ...

    def row_padding(self) -> int:
        """See Device."""
        ...

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        ...

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        ...

    def pack_head(self, weight: Tensor) -> Head:
        """See Device."""
        ...

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        ...

    def best(self, logits: Tensor) -> Tensor:
        """See Device."""
        ...

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        """See Device."""
        ...

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        ...

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        ...


class CpuDevice:
    """Implements device.base.Device. kernels: `auto`, `torch`, or one instruction set of native.build."""

    collectives = "gloo"

    def __init__(self, index: int, *, threads: int, kernels: str = AUTO) -> None:
        self.name = f"cpu:{index}"
        self.threads = threads or process.num_cores()
        torch.set_num_threads(self.threads)  # process-wide; the only place that sets it
        library = None if kernels == TORCH else open_library(kernels)
        self._kernels: Kernels = (
            TorchKernels(self.threads) if library is None else NativeKernels(library, self.threads)
        )
        self._carrier = library
        self.variant = self._kernels.variant
        self.row_padding = self._kernels.row_padding
        self.pack_linear = self._kernels.pack_linear
        self.pack_gated = self._kernels.pack_gated
        self.pack_head = self._kernels.pack_head
        self.norm = self._kernels.norm
        self.best = self._kernels.best
        self.draw = self._kernels.draw
        self.rotate_and_store = self._kernels.rotate_and_store
        self.attend = self._kernels.attend
        self._cache = PagedCache()
        self._memory: KvMemory | None = None

    def memory(self) -> tuple[int, int]:
        """See Device."""
        return process.host_memory()

    def put(self, tensor: Tensor) -> Tensor:
        """See Device."""
        return tensor

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See Device."""
        return lambda: tensor

    def alloc_kv(self, shape: KvShape) -> None:
        """See Device."""
        # one block more than asked for: it stays zero, and what lies past the end of a sequence is read from it
        size = (shape.num_blocks + 1, shape.block_size, shape.kv_heads, shape.head_dim)
        try:
            caches = [torch.empty(size, dtype=shape.dtype) for _ in range(2 * shape.num_layers)]
        except RuntimeError as error:
            raise DeviceUnavailable(
                f"the KV cache of {shape.num_blocks} blocks could not be allocated; "
                "lower --max_cache_size"
            ) from error
        self._cache = PagedCache(caches[0::2], caches[1::2], shape.block_size, shape.kv_heads)
        # asks for huge pages, which there are only before the first touch
        self._kernels.use(self._cache)
        for cache in caches:
            cache.zero_()
        regions = regions_of([cache[: shape.num_blocks] for cache in caches])
        self._memory = KvMemory(kv_layout(shape), shape.num_blocks, regions, carrier=self._carrier)

    def kv_memory(self) -> KvMemory:
        """See Device."""
        if self._memory is None:
            raise DeviceUnavailable("the KV cache is not allocated yet")
        return self._memory

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See Device."""
        here, there = torch.tensor(sources), torch.tensor(targets)
        for cache in (*self._cache.keys, *self._cache.values):
            cache[there] = cache[here]

    def close(self) -> None:
        """See Device."""
        self._cache, self._memory = PagedCache(), None
        self._kernels.use(self._cache)


def open_library(instruction_set: str = AUTO) -> Library | None:
    """The native kernels, compiled if need be; None, and one line of the log, when they cannot be had.

    `auto`: the best set that this machine has, its system allows and its compiler knows; one line of the log when it is not the machine's best.
    """
    causes = []
    for name in instruction_sets() if instruction_set == AUTO else [instruction_set]:
        try:
            library = Library(build(name), name)
        except (DeviceUnavailable, OSError) as error:
            causes.append(str(error))
            continue
        if causes:
            _log.warning("the cpu's best kernels cannot be had", used=name, cause=causes[0])
        return library
    _log.warning("no native kernels, torch computes, at about half the speed", cause=causes[0])
    return None
