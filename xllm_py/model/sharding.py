"""Which part of a model a rank holds when several ranks compute it together, and how their results become one.

Tensor parallelism by hand: heads and the inner size of MLPs are shared out, so that a layer needs two sums over the ranks, one behind attention and one
behind the MLP. Norms and routers are on every rank; embedding and head are cut by vocabulary. KV heads fewer than ranks are held by several.
Experts may be shared out whole: the ranks form so many groups, each group has its experts, and an expert is cut among the ranks of its group only.
Source: Shoeybi et al. 2019, Megatron-LM, section 3; Lepikhin et al. 2020, GShard, for experts; for grouped heads core/kv_plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from xllm_py.base.errors import UsageError
from xllm_py.core.kv_plan import heads_of
from xllm_py.model.config import ModelConfig


class Ranks(Protocol):
    """The others, as a model needs them (device/collectives)."""

    def sum(self, mine: Tensor) -> Tensor:
        """Of every rank's; the same bits on every rank, and for a row whatever rows stand beside it."""
        ...

    def columns(self, mine: Tensor) -> Tensor:
        """[rows, columns] of every rank side by side, in order of rank; all have the same shape."""
        ...


class _Alone:
    """Implements Ranks for one."""

    def sum(self, mine: Tensor) -> Tensor:
        return mine

    def columns(self, mine: Tensor) -> Tensor:
        return mine


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's share."""

    rank: int = 0
    count: int = 1
    expert_groups: int = 1  # --ep_size; divides count
    ranks: Ranks = field(default_factory=_Alone)

    def experts(self, total: int) -> tuple[range, Shard]:
        """The experts of this rank's group, and its share of each of them; to sum is the caller's."""
        members, each = self.count // self.expert_groups, total // self.expert_groups
        group, rank = divmod(self.rank, members)
        return range(group * each, (group + 1) * each), Shard(rank=rank, count=members)

    def of(self, total: int) -> slice:
        """An even share of so many; `check` has seen to it that there is one."""
        each = total // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def heads(self, config: ModelConfig) -> tuple[range, range]:
        """Query heads and KV heads."""
        each = config.num_heads // self.count
        queries = range(self.rank * each, (self.rank + 1) * each)
        return queries, heads_of(self.rank, self.count, config.num_kv_heads)

    def vocabulary(self, size: int) -> tuple[range, int]:
        """The ids whose rows of the embedding and the head are here, and how many every rank but the last ones has."""
        each = -(-size // self.count)
        return range(min(self.rank * each, size), min((self.rank + 1) * each, size)), each

    def check(self, config: ModelConfig) -> None:
        """Raises UsageError when the model cannot be shared out among so many."""
        count = self.count
        sizes = {"attention heads": config.num_heads, "rows of its MLPs": config.intermediate_size}
        for what, size in sizes.items():
            if size % count:
                raise UsageError(
                    f"{count} ranks cannot share out the model's {size} {what}; use a number of devices that divides them"
                )
        self._check_experts(config)
        kv_heads = config.num_kv_heads
        if kv_heads % count and count % kv_heads:
            raise UsageError(
                f"{count} ranks cannot share out the model's {kv_heads} KV heads; use a number of devices that divides them or is a multiple"
            )

    def _check_experts(self, config: ModelConfig) -> None:
        groups, experts = self.expert_groups, config.experts
        if experts is None:
            if groups > 1:
                raise UsageError(f"--ep_size={groups}: the model has no experts; leave it out")
            return
        if experts.count % groups:
            raise UsageError(
                f"--ep_size={groups} does not divide the model's {experts.count} experts; use a number that does"
            )
        members, wide = self.count // groups, experts.intermediate_size
        if wide % members:
            raise UsageError(
                f"{members} ranks cannot share out the {wide} rows of an expert; raise --ep_size, or use a number of devices that divides them"
            )


def embedded(shard: Shard, ids: Tensor, size: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows of these ids, of which each rank has some. embed: of the ids that are here, counted from the first."""
    if shard.count == 1:
        return embed(ids)
    here, _ = shard.vocabulary(size)
    local = ids - here.start
    inside = (local >= 0) & (local < len(here))
    rows = embed(local.clamp(0, max(0, len(here) - 1)))
    return shard.ranks.sum(torch.where(inside[:, None], rows, torch.zeros_like(rows)))
