"""What ranks of one model say to each other while they compute: sums, columns side by side, and rank 0's plans.

Over torch.distributed. Sums are made by every rank from everybody's numbers in order of rank, in float32: a library's own reduction cuts a tensor
into pieces and adds each in another order, so a row's bits would depend on how many rows there are. Implements model.sharding.Ranks.
"""

from __future__ import annotations

import struct
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

_PLAN_BYTES = 1 << 16  # told at once; longer plans in two
_LENGTH = struct.Struct("<q")
_NEVER = timedelta(
    days=365
)  # an idle instance has no plans to tell; who is gone is found otherwise


class Collectives:
    """Of this process. store: where all ranks have met. backend: of sums (`Device.collectives`); plans go by gloo."""

    def __init__(self, store: Store, rank: int, count: int, backend: str) -> None:
        self._rank, self._count = rank, count
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", store),
            rank=rank,
            world_size=count,
            timeout=_NEVER,
        )
        self._tensors = None if backend == "gloo" else dist.new_group(backend=backend)
        self._plan = torch.zeros(_PLAN_BYTES, dtype=torch.uint8)

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        """Of every rank, on this one's device; those of the host, and of devices without collectives of their own, by gloo."""
        group = None if mine.device.type == "cpu" else self._tensors
        here = (mine.cpu() if group is None else mine).contiguous()
        parts = [torch.empty_like(here) for _ in range(self._count)]
        dist.all_gather(parts, here, group=group)
        return [part.to(mine.device) for part in parts]

    def sum(self, mine: Tensor) -> Tensor:
        """See Ranks."""
        first, *others = self._gathered(mine)
        total = first.float()
        for other in others:
            total = total + other.float()
        return total.to(mine.dtype)

    def columns(self, mine: Tensor) -> Tensor:
        """See Ranks."""
        return torch.cat(self._gathered(mine), dim=-1)

    def least(self, number: int) -> int:
        """Of every rank's."""
        return min(int(part) for part in self._gathered(torch.tensor([number])))

    def tell(self, plan: bytes) -> None:
        """Rank 0: to all others."""
        length = len(plan)
        head = _LENGTH.pack(length) + plan[: _PLAN_BYTES - _LENGTH.size]
        self._plan[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(self._plan, 0)
        if length > _PLAN_BYTES - _LENGTH.size:
            dist.broadcast(torch.frombuffer(bytearray(plan), dtype=torch.uint8), 0)

    def hear(self) -> bytes:
        """Other ranks: what rank 0 tells next, however long that takes."""
        dist.broadcast(self._plan, 0)
        raw = self._plan.numpy().tobytes()
        (length,) = _LENGTH.unpack_from(raw)
        if length <= _PLAN_BYTES - _LENGTH.size:
            return raw[_LENGTH.size : _LENGTH.size + length]
        rest = torch.zeros(length, dtype=torch.uint8)
        dist.broadcast(rest, 0)
        return rest.numpy().tobytes()

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()
