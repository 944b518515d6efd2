"""Mixture of experts: a router chooses some of many MLPs for each token, and their results are summed by its weights.

Exact like the rest: the tokens of a step are sorted by expert, each expert computes its tokens in one product of padded rows, whose
bits do not depend on each other, and the results of a token are summed in ascending order of expert, not in the order they were made.
Every rank routes all tokens, computes those of the experts it has, and the ranks' sums are summed.
Source: Shazeer et al. 2017, Outrageously large neural networks; Fedus et al. 2021 for the router's softmax.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.model.config import ExpertsConfig
from xllm_py.model.layers.mlp import GatedMlp
from xllm_py.model.layers.parts import Parts


class Router:
    """Which experts a token goes to, and with what weight."""

    def __init__(self, parts: Parts, at: str, config: ExpertsConfig) -> None:
        self._config = config
        self._scores = parts.router(at, config.count)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden], padded -> experts [tokens, per_token] int64, ascending, and their weights, dtype of x.

        Of two experts with equal scores the lower number is chosen.
        """
        shares = torch.softmax(self._scores(x).float(), -1)
        highest = shares.sort(stable=True, dim=-1, descending=True).indices[
            :, : self._config.per_token
        ]
        if self._config.normalised:
            # summed from the highest down, one after the other: the order is part of the result
            total = torch.zeros(x.shape[0], 1, device=x.device)
            for place in range(self._config.per_token):
                total += shares.gather(1, highest[:, place : place + 1])
            shares = shares / total
        chosen = highest.sort(-1).values
        return chosen, shares.gather(1, chosen).to(x.dtype)


class Experts:
    """at: where router and experts stand in the checkpoint."""

    def __init__(self, parts: Parts, at: str, config: ExpertsConfig) -> None:
        self._padding = parts.device.row_padding()
        self._per_token = config.per_token
        self._router = Router(parts, f"{at}.gate", config)
        wide = config.intermediate_size
        self._count = config.count
        self._here, shard = parts.shard.experts(config.count)
        mine = replace(parts, shard=shard)
        self._experts = [GatedMlp(mine, f"{at}.experts.{i}", wide, sums=False) for i in self._here]
        for other in range(config.count):
            if other not in self._here:
                parts.weights.pass_over(f"{at}.experts.{other}")
        self._ranks = parts.shard.ranks

    def __call__(self, x: Tensor, real: int, residual: Tensor | None = None) -> Tensor:
        """x: [tokens, hidden], padded, of which the first `real` are tokens; rows of padding come back as zeros.

        residual: what the result is added to.
        """
        chosen, weights = self._router(x)
        each = self._per_token
        flat = chosen[:real].flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self._count).cpu().tolist()
        done = x.new_zeros(x.shape[0] * each, x.shape[1])
        start = sum(counts[: self._here.start])
        for expert, count in zip(
            self._experts, counts[self._here.start : self._here.stop], strict=True
        ):
            if not count:
                continue
            places = order[start : start + count]
            rows = functional.pad(x[places // each], (0, 0, 0, -count % self._padding))
            done[places] = expert(rows, count)[:count]
            start += count
        weighted = done.view(x.shape[0], each, -1) * weights[:, :, None]
        total = weighted[:, 0]
        for place in range(1, each):
            total = total + weighted[:, place]
        total = self._ranks.sum(total)
        return total if residual is None else residual + total
