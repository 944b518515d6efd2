"""Shares of a model: every family in threads that are its ranks gives what the whole gives; what cannot be shared out is refused."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.families import CASES, VOCABULARY, make_family
from tests.forward import our_logits
from xllm_py.base.errors import UsageError
from xllm_py.device import open_device
from xllm_py.device.base import AttentionBatch, KvShape
from xllm_py.model import load_model, open_weights, read_config
from xllm_py.model.sharding import Shard

IDS = [(37 * n) % VOCABULARY for n in range(50)]


class Threads:
    """Implements Ranks of threads that meet at each sum."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=30)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def of(self, rank: int) -> Place:
        return Place(self, rank)

    def exchange(self, rank: int, mine: Tensor) -> list[Tensor]:
        self._given[rank] = mine
        self._barrier.wait()
        everybody = list(self._given)
        self._barrier.wait()
        return everybody


class Place:
    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads, self._rank = threads, rank

    def sum(self, mine: Tensor) -> Tensor:
        return torch.stack(self._threads.exchange(self._rank, mine)).sum(0)

    def columns(self, mine: Tensor) -> Tensor:
        return torch.cat(self._threads.exchange(self._rank, mine), -1)


def logits_of(folder: Path, shard: Shard, told: Callable[[int], None]) -> Tensor:
    """Of IDS, on one rank."""
    config, device = read_config(folder), open_device("cpu:0", threads=1)
    model = load_model(
        config, device, open_weights(folder, torch.float32, "auto"), max_position=64, shard=shard
    )
    count = len(IDS)
    device.alloc_kv(
        KvShape(
            num_layers=config.num_layers,
            num_blocks=4,
            block_size=16,
            kv_heads=len(shard.heads(config)[1]),
            head_dim=config.head_dim,
            dtype=torch.float32,
        )
    )
    batch = AttentionBatch(
        block_tables=torch.arange(4, dtype=torch.int32)[None],
        first_tokens=torch.tensor([0]),
        num_tokens=torch.tensor([count]),
        context_tokens=torch.tensor([count]),
        slots=torch.arange(count),
    )
    padding = (0, -count % device.row_padding())
    with torch.inference_mode():
        hidden = model.forward(
            functional.pad(torch.tensor(IDS), padding),
            functional.pad(torch.arange(count), padding),
            batch,
            told,
        )
        return model.logits(hidden[:count]).cpu()


MIXTURES = [case for case in CASES if "moe" in case]


@pytest.mark.parametrize(
    ("case", "count", "groups"),
    [
        *((case, count, 1) for case in CASES for count in (2, 4)),
        *((case, count, groups) for case in MIXTURES for count, groups in ((2, 2), (4, 2), (4, 4))),
    ],
)
def test_the_shares_of_a_model_make_the_whole(
    tmp_path: Path, case: str, count: int, groups: int
) -> None:
    folder = make_family(tmp_path, CASES[case], seed=3)
    config = read_config(folder)
    wanted = our_logits(folder, IDS)
    threads = Threads(count)
    layers: list[list[int]] = [[] for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = list(
            pool.map(
                lambda rank: logits_of(
                    folder,
                    Shard(rank=rank, count=count, expert_groups=groups, ranks=threads.of(rank)),
                    layers[rank].append,
                ),
                range(count),
            )
        )
    assert all(each.equal(found[0]) for each in found), "every rank has the same logits"
    torch.testing.assert_close(found[0], wanted, atol=2e-4, rtol=2e-4)
    assert layers == [list(range(config.num_layers))] * count


def test_every_head_and_every_id_is_somewhere(tmp_path: Path) -> None:
    config = read_config(make_family(tmp_path, next(iter(CASES.values())), seed=0))
    for count in (1, 2, 4):
        shards = [Shard(rank=rank, count=count) for rank in range(count)]
        queries = [head for shard in shards for head in shard.heads(config)[0]]
        assert queries == list(range(config.num_heads))
        assert {head for shard in shards for head in shard.heads(config)[1]} == set(
            range(config.num_kv_heads)
        )
        for size in (1, 3, 7, 320, 321):
            ids = [token for shard in shards for token in shard.vocabulary(size)[0]]
            assert ids == list(range(size))


@pytest.mark.parametrize(
    ("changes", "count", "cause"),
    [
        ({"num_heads": 6}, 4, "6 attention heads"),
        ({"intermediate_size": 130}, 4, "130 rows of its MLPs"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "3 KV heads"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    tmp_path: Path, changes: dict[str, int], count: int, cause: str
) -> None:
    config = read_config(make_family(tmp_path, next(iter(CASES.values())), seed=0))
    with pytest.raises(UsageError, match=cause):
        Shard(count=count).check(dataclasses.replace(config, **changes))  # type: ignore[arg-type]  # sizes by name


def test_every_row_of_every_expert_is_somewhere_once() -> None:
    for count, groups in ((1, 1), (2, 1), (2, 2), (4, 2), (8, 4)):
        seen = [
            (expert, row)
            for rank in range(count)
            for here, share in [Shard(rank=rank, count=count, expert_groups=groups).experts(8)]
            for expert in here
            for row in range(share.of(16).start, share.of(16).stop)
        ]
        assert sorted(seen) == [(expert, row) for expert in range(8) for row in range(16)]


def test_experts_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    dense = read_config(make_family(tmp_path / "dense", CASES["qwen3"]))
    with pytest.raises(UsageError, match="--ep_size=2: the model has no experts"):
        Shard(count=2, expert_groups=2).check(dense)
    mixed = read_config(make_family(tmp_path / "mixed", CASES["qwen3_moe"]))
    many = dataclasses.replace(mixed, num_heads=16, num_kv_heads=16, intermediate_size=96)
    with pytest.raises(UsageError, match="--ep_size=16 does not divide the model's 8 experts"):
        Shard(count=16, expert_groups=16).check(many)
    assert mixed.experts is not None
    odd = dataclasses.replace(mixed.experts, intermediate_size=49)
    with pytest.raises(UsageError, match="2 ranks cannot share out the 49 rows of an expert"):
        Shard(count=4, expert_groups=2).check(dataclasses.replace(mixed, experts=odd))
    Shard(count=4, expert_groups=4).check(dataclasses.replace(mixed, experts=odd))
