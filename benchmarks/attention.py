"""How near is attention over the paged cache to the machine's limits, and what does exactness cost against torch's own (SDPA)?

All layers of the Qwen2-0.5B shape (14 query heads on 2 KV heads of 64, 24 layers), bfloat16, blocks of 128 tokens. Decode: one token of
each sequence behind 512 to 8,192 keys, against the time to read those keys and values (`limit`: the same cache read in order by two
threads, in the same rounds). Prefill: whole prompts, against the time of a product with as many operations (`limit`: causal half only).
SDPA takes the query heads of a KV head as rows of one product, not enable_gqa, which was 5 to 30 times slower. Results are compared
before times. One JSON line per row; `share`: limit / native, `over_sdpa`: SDPA / native, `over_torch`: our torch kernels / native.

    python -m benchmarks.attention [--threads 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import emit, summary
from xllm_py.device.base import AttentionBatch, KvShape, Turn
from xllm_py.device.cpu import CpuDevice
from xllm_py.device.cpu.device import AUTO, TORCH

HEADS, KV_HEADS, DIM = 14, 2, 64
GROUP = HEADS // KV_HEADS
BLOCK, LAYERS = 128, 24
DTYPE = torch.bfloat16
DECODE = ((1, 512), (8, 512), (32, 512), (1, 2048), (8, 2048), (1, 8192), (4, 8192))
PREFILL = (512, 2048)


@dataclass(frozen=True)
class Case:
    """Sequences of so many keys in a cache of their own, and the last tokens of each as queries."""

    batch: int
    keys: int
    tokens: int
    tables: Tensor  # [batch, blocks] int32, shuffled
    caches: list[tuple[Tensor, Tensor]]  # of each layer, [rows, KV heads, dim]
    queries: Tensor  # [layers, batch * tokens, heads, dim]

    def step(self) -> AttentionBatch:
        """The same for every layer, as the engine makes it."""
        return AttentionBatch(
            block_tables=self.tables,
            first_tokens=torch.arange(self.batch) * self.tokens,
            num_tokens=torch.full((self.batch,), self.tokens),
            context_tokens=torch.full((self.batch,), self.keys),
            slots=torch.empty(self.batch * self.tokens, dtype=torch.int64),
        )


def make(batch: int, keys: int, tokens: int) -> Case:
    """Random numbers."""
    blocks = batch * keys // BLOCK
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(blocks, generator=generator).int()

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DTYPE)

    size = (blocks * BLOCK, KV_HEADS, DIM)
    return Case(
        batch,
        keys,
        tokens,
        order.view(batch, -1),
        [(draw(*size), draw(*size)) for _ in range(LAYERS)],
        draw(LAYERS, batch * tokens, HEADS, DIM),
    )


def fill(device: CpuDevice, case: Case) -> None:
    """Give the device the case's keys and values."""
    rows = case.caches[0][0].shape[0]
    device.alloc_kv(
        KvShape(
            num_layers=LAYERS,
            num_blocks=rows // BLOCK,
            block_size=BLOCK,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=DTYPE,
        )
    )
    turn = Turn(
        cos=torch.ones(1, DIM, dtype=DTYPE),
        sin=torch.zeros(1, DIM, dtype=DTYPE),
        positions=torch.zeros(rows, dtype=torch.int64),
    )
    for layer, (keys, values) in enumerate(case.caches):
        mixed = torch.cat((keys.repeat_interleave(GROUP, 1), keys, values), 1)
        device.rotate_and_store(mixed, layer, turn, torch.arange(rows))


def ours(device: CpuDevice, case: Case) -> Tensor:
    """One step of attention; the last layer's result."""
    batch = case.step()
    return [device.attend(q, layer, batch) for layer, q in enumerate(case.queries)][-1]


def gathered(cache: Tensor, case: Case) -> Tensor:
    """[batch, KV heads, keys, dim] of one layer's cache."""
    blocks = cache.view(-1, BLOCK, KV_HEADS, DIM)
    rows = blocks.index_select(0, case.tables.flatten().long())
    return rows.view(case.batch, case.keys, KV_HEADS, DIM).transpose(1, 2)


def sdpa(case: Case) -> Tensor:
    """The same with torch's attention; the last layer's result in the layout of `attend`."""
    out = torch.empty(0)
    for (keys, values), q in zip(case.caches, case.queries, strict=True):
        k, v = gathered(keys, case), gathered(values, case)
        if case.tokens == 1:  # the query heads of a KV head are its rows
            grouped = q.view(case.batch, KV_HEADS, GROUP, DIM)
            out = scaled_dot_product_attention(grouped, k, v).reshape(case.batch, HEADS, DIM)
            continue
        # a prompt alone: causal, so heads stay heads; the KV heads are repeated
        k, v = (
            x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(1, HEADS, -1, DIM) for x in (k, v)
        )
        wide = q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(wide, k, v, is_causal=True)[0].transpose(0, 1)
    return out


def read(case: Case) -> Tensor:
    """Every key and value once, in order: what the memory gives. Summed as 64-bit words, which costs least."""
    return torch.stack([x.view(torch.int64).sum() for layer in case.caches for x in layer])


def multiply(device: CpuDevice, case: Case) -> Callable[[], object]:
    """Products with the operations of causal attention, 2 x 2 x dim for each of keys * (keys + 1) / 2 pairs and head."""
    operations = 4 * DIM * HEADS * LAYERS * case.keys * (case.keys + 1) // 2
    size = 1024
    linear = device.pack_linear(torch.randn(size, size).to(DTYPE), None)
    x = torch.randn(operations // (2 * size * size), size).to(DTYPE)
    return lambda: linear(x)


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(case: Case, threads: int, rounds: int) -> None:
    """Compare once, then take turns."""
    native, plain = (CpuDevice(0, threads=threads, kernels=kernels) for kernels in (AUTO, TORCH))
    for device in (native, plain):
        fill(device, case)
    wanted = sdpa(case)
    for device in (native, plain):
        torch.testing.assert_close(ours(device, case), wanted, rtol=0.02, atol=0.02)
    decode = case.tokens == 1
    runs: dict[str, Callable[[], object]] = {
        "native": lambda: ours(native, case),
        "torch": lambda: ours(plain, case),
        "sdpa": lambda: sdpa(case),
        "limit": (lambda: read(case)) if decode else multiply(native, case),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(1e3 * seconds(run))
    figures = {name: summary(samples) for name, samples in times.items()}
    middle = {name: figure["median"] for name, figure in figures.items()}
    what = f"decode batch {case.batch}" if decode else "prefill"
    settings = {"keys": case.keys, "layers": LAYERS, "dtype": "bfloat16", "threads": threads}
    shares = {
        "share": float(f"{middle['limit'] / middle['native']:.3g}"),
        "over_sdpa": float(f"{middle['sdpa'] / middle['native']:.3g}"),
        "over_torch": float(f"{middle['torch'] / middle['native']:.3g}"),
    }
    emit(
        f"attention, {what}",
        settings,
        {**{f"{name}_ms": figure for name, figure in figures.items()}, **shares},
    )
    for device in (native, plain):
        device.close()


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with torch.inference_mode():
        for batch, keys in DECODE:
            measure(make(batch, keys, 1), options.threads, options.rounds)
        for keys in PREFILL:
            measure(make(1, keys, keys), options.threads, options.rounds)


if __name__ == "__main__":
    main()
