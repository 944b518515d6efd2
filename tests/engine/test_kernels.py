"""The kernels under exactness, one by one: a row's bits depend on nothing but the row, for awkward sizes and thread counts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from tests.engine.draws import sample
from xllm_py.core.plan import RowStart
from xllm_py.core.sampling import SamplingParams
from xllm_py.device.base import AttentionBatch, KvShape, Turn
from xllm_py.device.cpu import CpuDevice
from xllm_py.device.cpu.native.build import instruction_sets
from xllm_py.device.torch_forms import silu

DTYPES = (torch.float32, torch.bfloat16)
# KV heads, query heads of each, head size
HEADS = (
    (1, 1, 96),
    (1, 3, 64),
    (1, 5, 40),
    (1, 7, 24),
    (2, 7, 64),
    (3, 2, 80),
    (5, 1, 16),
    (2, 4, 128),
)
LENGTHS = (1, 2, 130, 513, 1111)


OPENED = [(kernels, threads) for kernels in ("torch", *instruction_sets()) for threads in (1, 2)]


@pytest.fixture(params=OPENED, ids=lambda it: f"{it[0]}-threads{it[1]}")
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    kernels, threads = request.param
    before = torch.get_num_threads()
    yield CpuDevice(0, threads=threads, kernels=kernels)
    torch.set_num_threads(before)


class Sequences:
    """Random sequences in a cache whose blocks are shuffled."""

    def __init__(self, device: CpuDevice, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
        kv_heads, group, dim = heads
        self.device = device
        self.size = 16
        counts = [-(-length // self.size) for length in LENGTHS]
        free = list(range(sum(counts)))
        random.Random(4).shuffle(free)
        self.blocks = [[free.pop() for _ in range(count)] for count in counts]
        shape = KvShape(
            num_layers=1,
            num_blocks=sum(counts),
            block_size=self.size,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=dtype,
        )
        device.alloc_kv(shape)
        generator = torch.Generator().manual_seed(1)
        slots = torch.arange(sum(counts) * self.size)
        keys, values = (
            torch.randn(len(slots), kv_heads, dim, generator=generator).to(dtype) for _ in range(2)
        )
        unturned = Turn(
            cos=torch.ones(1, dim, dtype=dtype),
            sin=torch.zeros(1, dim, dtype=dtype),
            positions=torch.zeros(len(slots), dtype=torch.int64),
        )
        queries = keys.repeat_interleave(group, 1)
        device.rotate_and_store(torch.cat((queries, keys, values), 1), 0, unturned, slots)
        self.queries = [
            torch.randn(length, kv_heads * group, dim, generator=generator).to(dtype)
            for length in LENGTHS
        ]

    def attend(self, spans: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Each span is (sequence, first token, end): these tokens are computed in this step."""
        tables = torch.zeros(len(spans), max(map(len, self.blocks)), dtype=torch.int32)
        firsts, total = [], 0
        for row, (sequence, first, end) in enumerate(spans):
            blocks = self.blocks[sequence][: -(-end // self.size)]
            tables[row, : len(blocks)] = torch.tensor(blocks)
            firsts.append(total)
            total += end - first
        batch = AttentionBatch(
            block_tables=tables,
            first_tokens=torch.tensor(firsts),
            num_tokens=torch.tensor([end - first for _, first, end in spans]),
            context_tokens=torch.tensor([end for _, _, end in spans]),
            slots=torch.empty(total, dtype=torch.int64),  # as many as there are tokens
        )
        rows = torch.cat([self.queries[sequence][first:end] for sequence, first, end in spans])
        out = self.device.attend(rows, 0, batch)
        return list(out.split(batch.num_tokens.tolist()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_of_a_token_depends_on_its_context_only(
    device: CpuDevice, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    sequences = Sequences(device, heads, dtype)
    whole = [sequences.attend([(i, 0, length)])[0] for i, length in enumerate(LENGTHS)]
    chooser = random.Random(7)
    for _ in range(12):
        spans = []
        for sequence in chooser.sample(range(len(LENGTHS)), chooser.randint(1, len(LENGTHS))):
            end = chooser.randint(1, LENGTHS[sequence])
            spans.append((sequence, max(0, end - chooser.choice((1, 1, 2, 3, 5, 9, 33, 130))), end))
        for (sequence, first, end), got in zip(spans, sequences.attend(spans), strict=True):
            assert torch.equal(got, whole[sequence][first:end]), (sequence, first, end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 33), (100, 97), (130, 321), (257, 1001), (4864, 64)])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(
    device: CpuDevice, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    width, out = shape
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(out, width, generator=generator), torch.randn(out)
    linear = device.pack_linear(weight.to(dtype), bias.to(dtype))
    x = torch.randn(300, width, generator=generator).to(dtype)
    padding = device.row_padding()
    whole = linear(x)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 65, 130):
        first = count % 7
        few = functional.pad(x[first : first + count], (0, 0, 0, -count % padding))
        assert torch.equal(linear(few)[:count], whole[first : first + count]), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_a_number_does_not_depend_on_where_it_stands(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16:  # all there are
        x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    else:
        x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3)) * 6
    pieces = torch.cat([silu(piece.clone()) for piece in x.split(5)])
    torch.testing.assert_close(silu(x), pieces, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(silu(x), functional.silu(x), equal_nan=True)


def test_top_p_cuts_at_the_same_token_alone_and_together(device: CpuDevice) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 151_936, generator=generator)
    logits[0, :10] = 12 + 0.3 * torch.rand(10, generator=generator)
    weights = (logits[0] - logits.max()).double().exp().sort(descending=True).values
    top_p = float(weights[:3].sum() / weights.sum())  # the fourth is in or out by the last bit
    for _ in range(4):
        top_p = math.nextafter(top_p, 0)
    for _ in range(8):
        rows = [
            RowStart(
                row=seed,
                request_id="",
                block_ids=(),
                sampling=SamplingParams(max_tokens=1, top_p=top_p, seed=seed),
            )
            for seed in (0, 2)
        ]
        together = sample(logits.repeat(2, 1), rows, [0, 0])
        assert [sample(logits, [row], [0])[0] for row in rows] == together
        top_p = math.nextafter(top_p, 1)
