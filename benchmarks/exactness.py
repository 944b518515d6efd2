"""What exactness costs: attention whose bits do not depend on the batch against torch's own (SDPA, grouped), in one run.

One layer at the Qwen2-0.5B shape (14 query heads on 2 KV heads of 64) over 512 keys in blocks of 128: decode at batch 1 and 8, and a
prompt of 512. Both sides start from queries and a paged cache; SDPA takes the query heads of a KV head as rows of one product, not
enable_gqa, which was 5 to 30 times slower. Results are compared before times. One JSON line per row; `ratio` is exact / SDPA.

    python -m benchmarks.exactness [--threads 2] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import emit, summary
from xllm_py.device.base import AttentionBatch, KvShape
from xllm_py.device.cpu import CpuDevice

HEADS, KV_HEADS, DIM = 14, 2, 64
GROUP = HEADS // KV_HEADS
KEYS, BLOCK, LAYERS = 512, 128, 24
TABLE = KEYS // BLOCK
MOST = 8  # sequences


def tables(batch: int) -> Tensor:
    """Blocks of each sequence, shuffled."""
    order = torch.randperm(MOST * TABLE, generator=torch.Generator().manual_seed(2))
    return order[: batch * TABLE].view(batch, TABLE).int()


def step(batch: int, tokens: int) -> AttentionBatch:
    """The last tokens of each sequence; the same for every layer, as the engine does it."""
    return AttentionBatch(
        block_tables=tables(batch),
        first_tokens=list(range(0, batch * tokens, tokens)),
        num_tokens=[tokens] * batch,
        context_tokens=[KEYS] * batch,
        slots=torch.empty(0, dtype=torch.int64),
    )


def exact(device: CpuDevice, queries: Tensor, batch: int) -> Tensor:
    """One step of attention; the last layer's result."""
    plan = step(batch, queries.shape[1] // batch)
    return [device.attend(q, layer, plan) for layer, q in enumerate(queries)][-1]


def gathered(cache: Tensor, batch: int) -> Tensor:
    """[batch, KV heads, keys, dim] of one layer's cache."""
    rows = cache.index_select(0, tables(batch).flatten().long())
    return rows.view(batch, KEYS, KV_HEADS, DIM).transpose(1, 2)


def sdpa(caches: list[tuple[Tensor, Tensor]], queries: Tensor, batch: int) -> Tensor:
    """The same with torch's attention; the last layer's result in the layout of `attend`."""
    out = torch.empty(0)
    for (keys, values), q in zip(caches, queries, strict=True):
        k, v = gathered(keys, batch), gathered(values, batch)
        if q.shape[0] == batch:  # one token each: the query heads of a KV head are its rows
            grouped = q.view(batch, KV_HEADS, GROUP, DIM)
            out = scaled_dot_product_attention(grouped, k, v).reshape(batch, HEADS, DIM)
            continue
        # a prompt alone: causal, so heads stay heads; the KV heads are repeated
        k, v = (
            x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(1, HEADS, -1, DIM) for x in (k, v)
        )
        wide = q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(wide, k, v, is_causal=True)[0].transpose(0, 1)
    return out


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Print one line per case and dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cases = (("decode batch 1", 1, 1), ("decode batch 8", 8, 1), ("prefill 512", 1, KEYS))
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            device, caches = filled(dtype, options.threads)
            for what, batch, tokens in cases:
                measure(device, caches, what, batch, tokens, options.rounds)
            device.close()


def filled(dtype: torch.dtype, threads: int) -> tuple[CpuDevice, list[tuple[Tensor, Tensor]]]:
    """A device with random keys and values, and the same as tensors of [blocks, block, KV heads, dim]."""
    device = CpuDevice(0, threads=threads)
    device.alloc_kv(
        KvShape(
            num_layers=LAYERS,
            num_blocks=MOST * TABLE,
            block_size=BLOCK,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=dtype,
        )
    )
    generator = torch.Generator().manual_seed(1)
    size = (MOST * TABLE * BLOCK, KV_HEADS, DIM)
    caches = []
    for layer in range(LAYERS):
        keys, values = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
        device.write_kv(layer, keys, values, torch.arange(size[0]))
        caches.append((keys.view(-1, BLOCK, *size[1:]), values.view(-1, BLOCK, *size[1:])))
    return device, caches


def measure(
    device: CpuDevice,
    caches: list[tuple[Tensor, Tensor]],
    what: str,
    batch: int,
    tokens: int,
    rounds: int,
) -> None:
    """Compare once, then alternate."""
    dtype = caches[0][0].dtype
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(LAYERS, batch * tokens, HEADS, DIM, generator=generator).to(dtype)
    ours, wanted = exact(device, queries, batch), sdpa(caches, queries, batch)
    torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.02)
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(1e3 * seconds(lambda: exact(device, queries, batch)))
        theirs.append(1e3 * seconds(lambda: sdpa(caches, queries, batch)))
    left, right = summary(mine), summary(theirs)
    emit(
        f"exact attention, {what}",
        {
            "layers": LAYERS,
            "keys": KEYS,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": device.threads,
        },
        {
            "exact_ms": left,
            "sdpa_ms": right,
            "ratio": float(f"{left['median'] / right['median']:.3g}"),
        },
    )


if __name__ == "__main__":
    main()
