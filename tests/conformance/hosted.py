"""A device whose memory is not the host's, as the device suite wants it: everything is given and read on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from xllm_py.core.kv_memory import KvMemory
from xllm_py.device.apart import ApartDevice
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


class PlainTorch(ApartDevice):
    """What cuda computes with, on the host."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu", 0))

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def variant(self) -> str:
        return "plain torch"


class Hosted:
    """Implements Device over one that is apart. block: it takes no blocks but multiples of this."""

    def __init__(self, device: ApartDevice, block: int = 1) -> None:
        self.inner = device
        self._block = block
        self.name = device.name
        self.collectives = device.collectives

    def _there(self, value: Any) -> Any:
        return self.inner.put(value) if isinstance(value, Tensor) else value

    def _wrapped(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: call(*(self._there(each) for each in given)).cpu()

    def memory(self) -> tuple[int, int]:
        return self.inner.memory()  # type: ignore[attr-defined,no-any-return]  # every device has it

    def variant(self) -> str:
        return self.inner.variant()  # type: ignore[attr-defined,no-any-return]

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def row_padding(self) -> int:
        return self.inner.row_padding()

    def pack_linear(self, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        return self._wrapped(self.inner.pack_linear(_copied(weight), bias))

    def pack_gated(self, weight: Tensor | Quantized, bias: Tensor | None) -> RowWise:
        return self._wrapped(self.inner.pack_gated(_copied(weight), bias))

    def pack_head(self, weight: Tensor) -> Head:
        return _Head(self, self.inner.pack_head(weight))

    def norm(self, weight: Tensor, eps: float) -> RowWise:
        norm = self.inner.norm(weight, eps)
        return self._wrapped(lambda x: norm(x.contiguous()))

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self.inner.fetch(tensor)

    def best(self, logits: Tensor) -> Tensor:
        return self.inner.best(logits)

    def draw(self, logits: Tensor, wanted: Sequence[Drawing]) -> list[list[int]]:
        return self.inner.draw(logits, wanted)

    def alloc_kv(self, shape: KvShape) -> None:
        if shape.block_size % self._block:
            pytest.skip(f"{self.name} takes blocks of {self._block} tokens")
        self.inner.alloc_kv(shape)

    def kv_memory(self) -> KvMemory:
        """Brought up to date in both directions: tests write to it and read from it."""
        memory = self.inner.kv_memory()
        assert memory.mirror is not None
        for layer in range(memory.layout.num_layers):
            memory.mirror.take_out(layer, range(memory.num_blocks))()
        return memory

    def settle(self) -> None:
        """What a test wrote into the host's bytes is in the cache from here on."""
        memory = self.inner.kv_memory()
        assert memory.mirror is not None
        memory.mirror.put_in(range(memory.num_blocks))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.inner.copy_blocks(sources, targets)

    def rotate_and_store(
        self, mixed: Tensor, layer: int, turn: Turn, slots: Tensor, norms: HeadNorms | None = None
    ) -> Tensor:
        there = Turn(
            cos=self._there(turn.cos),
            sin=self._there(turn.sin),
            positions=self._there(turn.positions),
        )
        if norms is not None:
            norms = HeadNorms(weight=self._there(norms.weight), eps=norms.eps)
        return self.inner.rotate_and_store(self._there(mixed), layer, there, slots, norms).cpu()

    def attend(
        self, queries: Tensor, layer: int, batch: AttentionBatch, sliding_window: int = 0
    ) -> Tensor:
        return self.inner.attend(self._there(queries), layer, batch, sliding_window).cpu()

    def close(self) -> None:
        self.inner.close()


class _Head:
    def __init__(self, device: Hosted, head: Head) -> None:
        self._device, self._head = device, head

    def __call__(self, x: Tensor) -> Tensor:
        return self._head(self._device._there(x))

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._head.embed(self._device._there(token_ids)).cpu()


def _copied(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A device apart has its own copy; plain torch on the host has not."""
    return weight.clone() if isinstance(weight, Tensor) else weight
