"""One GPU, computed on by our Triton kernels: their results do not depend on the batch, which a library's products promise nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.device.apart import ApartDevice
from xllm_py.device.base import (
    AttentionBatch,
    Drawing,
    Head,
    HeadNorms,
    Linear,
    Quantized,
    RowWise,
    Turn,
)
from xllm_py.device.cuda import drawing, launch
from xllm_py.device.mirror import Pinned, pinned_memory
from xllm_py.device.paged import PagedCache


class TritonDevice(ApartDevice):
    """Implements device.base.Device but for memory and variant, wherever Triton runs; in its interpreter that is the host."""

    def __init__(self, at: torch.device) -> None:
        super().__init__(at)
        self._kernels = launch.Attention(self._cache)

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        return self._product(weight, bias)

    def _product(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        offset = None if bias is None else self.put(bias)
        if isinstance(weight, Quantized):
            matrix = launch.Matrix(self.put(weight.values), offset, self.put(weight.scales))
        else:
            matrix = launch.Matrix(self.put(weight), offset)
        return lambda x, residual=None: launch.linear(x, matrix, residual)

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        """See Device."""
        both = self.pack_linear(weight, bias)
        return lambda x: launch.gated(both(x))

    def pack_head(self, weight: Tensor) -> Head:
        """See Device."""
        here = self.put(weight)
        return _Head(here, self.pack_linear(here, None))

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        """See Device."""
        here = self.put(weight)
        return lambda x: launch.rms_norm(x, here, eps)

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        """See Device."""
        return drawing.draw(self.put(logits), wanted, self.put)

    def _use(self, cache: PagedCache) -> None:
        super()._use(cache)
        self._kernels = launch.Attention(cache)

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        """See Device."""
        return launch.rotate_and_store(
            mixed, self._cache, layer, turn, self.slots_here(slots), norms
        )

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        """See Device."""
        return self._kernels.attend(queries, layer, batch, sliding_window)


class _Head:
    """Implements Head."""

    def __init__(self, weight: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        self._weight, self._product = weight, product

    def __call__(self, x: Tensor) -> Tensor:
        """See Head."""
        return self._product(x).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """See Head."""
        return functional.embedding(token_ids, self._weight)


class CudaDevice(TritonDevice):
    """GPU number `index`, which is there. is_exact: else products are the library's, faster and with other bits in another batch."""

    collectives = "nccl"

    def __init__(self, index: int, *, is_exact: bool = True) -> None:
        super().__init__(torch.device("cuda", index))
        self._is_exact = is_exact
        torch.cuda.set_device(index)
        stream = torch.cuda.current_stream(self._at)
        copies = torch.cuda.Stream(self._at)  # type: ignore[no-untyped-call]  # torch's

        def mark() -> Callable[[], None]:
            wait: Callable[[], None] = (
                torch.cuda.current_stream(self._at).record_event().synchronize
            )
            return wait

        def aside() -> AbstractContextManager[Any]:
            copies.wait_stream(stream)
            return torch.cuda.stream(copies)

        self._pinned = Pinned(pinned_memory, stream.synchronize, mark, aside)
        # sums in fewer bits than the numbers have would differ from one shape to another
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        """See Device."""
        if self._is_exact or isinstance(weight, Quantized):
            return self._product(weight, bias)
        return super(TritonDevice, self).pack_linear(weight, bias)

    def memory(self) -> tuple[int, int]:
        """See Device."""
        free, total = torch.cuda.mem_get_info(self._at)
        return int(free), int(total)

    def variant(self) -> str:
        """See Device."""
        products = "" if self._is_exact else " library products"
        return f"cuda {torch.cuda.get_device_name(self._at)} torch {torch.__version__}{products}"

    def close(self) -> None:
        """See Device."""
        super().close()
        torch.cuda.empty_cache()
