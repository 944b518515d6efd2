"""One forward pass of a model folder without an engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from tests.devices import BLOCK_SIZE, DEVICE
from xllm_py.device import open_device
from xllm_py.device.base import AttentionBatch, KvShape
from xllm_py.model import load_model, open_weights, read_config


def our_logits(folder: Path, ids: list[int], quantization: str = "") -> torch.Tensor:
    """[tokens, vocabulary], the prompt computed whole, in float32."""
    config, device = read_config(folder), open_device(DEVICE, threads=1)
    loaded = load_model(
        config,
        device,
        open_weights(folder, torch.float32, "auto"),
        max_position=config.max_position,
        quantization=quantization,
    )
    count = len(ids)
    device.alloc_kv(
        KvShape(
            num_layers=config.num_layers,
            num_blocks=-(-count // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
        )
    )
    batch = AttentionBatch(
        block_tables=torch.arange(-(-count // BLOCK_SIZE), dtype=torch.int32)[None],
        first_tokens=torch.tensor([0]),
        num_tokens=torch.tensor([count]),
        context_tokens=torch.tensor([count]),
        slots=torch.arange(count),
    )
    padding = (0, -count % device.row_padding())
    with torch.inference_mode():
        hidden = loaded.forward(
            device.put(functional.pad(torch.tensor(ids), padding)),
            device.put(functional.pad(torch.arange(count), padding)),
            batch,
        )
        logits = loaded.logits(hidden[:count]).cpu()
    device.close()
    return logits
