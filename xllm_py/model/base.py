"""What the rank side of the engine asks of a model, whatever its family. Made by model.load_model, called by engine/worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from xllm_py.device.base import AttentionBatch
from xllm_py.model.config import ModelConfig

Stored = Callable[[int], None]  # told the index of a layer whose keys and values are in the cache


class Model(Protocol):
    """One model on one rank. A row of a result depends, to the bit, on its token and what stands before it alone."""

    config: ModelConfig
    dtype: torch.dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        stored: Stored | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [tokens, hidden].

        token_ids, positions: [tokens] int64, on the device (`Device.put`), padded by the caller to a multiple of the device's row padding.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocabulary] float32; good until the next call."""
        ...
