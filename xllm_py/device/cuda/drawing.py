"""Draws tokens on the device: lays out what is wanted in columns and calls the kernels. Logits stay where they are; tokens come to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xllm_py.device.base import Drawing
from xllm_py.device.cuda import draw_kernels as kernels

_PIECE = 4096  # of a row; also with few rows, so that a row's sums are the same in any company
_STEEPEST = 1e30  # finite, so that the highest logit's own difference, nothing, stays nothing


def draw(
    logits: Tensor, wanted: Sequence[Drawing], put: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """See Device.draw; put: Device.put."""
    size, count = logits.shape[1], len(wanted)
    weights = torch.empty(count, size, dtype=torch.float32, device=logits.device)
    scales = [min(math.log2(math.e) / each.temperature, _STEEPEST) for each in wanted]
    kernels.weigh[(count,)](
        weights,
        logits.contiguous(),
        put(torch.tensor([each.row for each in wanted])),
        put(torch.tensor(scales, dtype=torch.float32)),
        put(torch.tensor([each.min_p for each in wanted], dtype=torch.float32)),
        size,
        PIECE=_PIECE,
    )
    if any(each.top_k < size for each in wanted):
        enough = put(torch.tensor([each.top_k for each in wanted], dtype=torch.float64))
        kernels.keep[(count,)](weights, enough, size, OF_WEIGHT=False, PIECE=_PIECE)
    if any(each.top_p < 1 for each in wanted):
        enough = put(torch.tensor([each.top_p for each in wanted], dtype=torch.float64))
        kernels.keep[(count,)](weights, enough, size, OF_WEIGHT=True, PIECE=_PIECE)
    draws = [len(each.numbers) for each in wanted]
    numbers = put(torch.from_numpy(np.concatenate([each.numbers for each in wanted])))
    tokens = torch.empty(len(numbers), dtype=torch.int64, device=logits.device)
    owners = put(torch.arange(count).repeat_interleave(torch.tensor(draws)))
    kernels.pick[(len(numbers),)](tokens, weights, owners, numbers, size, PIECE=_PIECE)
    for each, row in zip(wanted, weights, strict=True):
        if each.weights is not None:
            each.weights.copy_(row)
    return [each.tolist() for each in np.split(tokens.cpu().numpy(), np.cumsum(draws)[:-1])]
