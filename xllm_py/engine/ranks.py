"""The real Executor: opens the device, reads the model, sizes the KV cache, and computes steps on one rank.

Called by engine/__main__, inside a function, because this is where torch comes in. More ranks than one are refused at the door
until they are built.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from xllm_py.base import log
from xllm_py.base.errors import DeviceUnavailable, UsageError
from xllm_py.base.hashing import fingerprint
from xllm_py.core.config import EngineConfig, ModelFacts
from xllm_py.core.executor import Capacity, Executor, LayerDone
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.device import open_device
from xllm_py.device.base import Device, KvShape
from xllm_py.engine.grammar import Matchers
from xllm_py.engine.self_test import numerics_fingerprint
from xllm_py.engine.worker import Worker
from xllm_py.model import load_model, pick_dtype, read_config
from xllm_py.model.config import ModelConfig

_CPU_CACHE_BYTES = 4 << 30
_MIB = 1 << 20
_SAMPLES = 64  # of each weight file, for the fingerprint
_SAMPLE_BYTES = 4096

_log = log.get(__name__)


def open_executor(config: EngineConfig) -> Executor:
    """Load everything. Raises ModelLoadError, DeviceUnavailable or UsageError with cause and fix in one line."""
    if len(config.devices) != 1:
        text = "more than one device per instance is not built yet; pass one, as --devices=cpu:0"
        raise UsageError(text)
    folder = Path(config.model_path)
    model_config = read_config(folder)
    max_len = _longest(config, model_config)
    device = open_device(config.devices[0], threads=config.cpu_threads)
    dtype = pick_dtype(config.dtype, model_config)
    model = load_model(
        folder,
        model_config,
        device,
        dtype=dtype,
        load_format=config.load_format,
        max_position=max_len,
        quantization=config.quantization,
    )
    sizing = _size_cache(config, model_config, device, dtype, max_len)
    device.alloc_kv(_kv_shape(config, model_config, sizing.num_blocks, dtype))
    worker = Worker(
        model,
        device,
        max_seqs=config.scheduler.max_seqs_per_batch,
        max_blocks=-(-max_len // config.cache.block_size),
        block_size=config.cache.block_size,
        matchers=Matchers(folder, model_config.vocab_size, model_config.eos_token_ids),
        logprobs_mode=config.logprobs_mode,
    )
    variant = " ".join(filter(None, (model_config.rope.variant(max_len), config.quantization)))
    capacity = Capacity(
        num_blocks=sizing.num_blocks,
        block_size=config.cache.block_size,
        max_seqs=config.scheduler.max_seqs_per_batch,
        facts=ModelFacts(
            vocab_size=model_config.vocab_size,
            max_model_len=max_len,
            eos_token_ids=model_config.eos_token_ids,
        ),
        dtype=str(dtype).removeprefix("torch."),
        device=device.name,
        model_fingerprint=model_fingerprint(folder, dtype, variant),
        numerics_fingerprint=numerics_fingerprint(
            worker,
            model_config.vocab_size,
            max_len,
            sizing.num_blocks,
            config.cache.block_size,
            device.variant(),
        ),
        summary=sizing.summary,
    )
    return OneRank(worker, device, capacity)


def _kv_shape(
    config: EngineConfig, model: ModelConfig, num_blocks: int, dtype: torch.dtype
) -> KvShape:
    return KvShape(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
    )


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest sequence that is served."""
    wanted = config.max_model_len or model.max_position
    if wanted > model.longest:
        raise UsageError(
            f"--max_model_len={wanted} is more than the model's {model.longest}; lower it"
        )
    return wanted


class OneRank:
    """Implements core.executor.Executor in this process."""

    def __init__(self, worker: Worker, device: Device, capacity: Capacity) -> None:
        self.worker = worker
        self._device = device
        self._capacity = capacity

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        """See Executor."""
        return self.worker.execute(plan, layer_done)

    def capacity(self) -> Capacity:
        """See Executor."""
        return self._capacity

    def kv_memory(self) -> KvMemory:
        """See Executor."""
        return self._device.kv_memory()

    def close(self) -> None:
        """See Executor."""
        self.worker.close()
        self._device.close()


@dataclass(frozen=True, slots=True)
class _Sizing:
    num_blocks: int
    summary: tuple[str, ...]


def _size_cache(
    config: EngineConfig, model: ModelConfig, device: Device, dtype: torch.dtype, max_len: int
) -> _Sizing:
    """How many blocks fit, and why, in plain words."""
    cache = config.cache
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    block_bytes = token_bytes * cache.block_size
    free, total = device.memory()
    usable = int(free * cache.max_memory_utilization)
    if cache.max_cache_bytes:
        wanted, why = cache.max_cache_bytes, "--max_cache_size"
    elif device.name.startswith("cpu:"):
        wanted, why = (
            min(_CPU_CACHE_BYTES, free // 4),
            "a quarter of the free memory, at most 4 GiB",
        )
    else:
        wanted, why = usable, "--max_memory_utilization of the free memory"
    budget = min(wanted, usable)
    if budget < wanted:
        why += f", cut to {cache.max_memory_utilization:g} of the free memory by --max_memory_utilization"
    num_blocks = budget // block_bytes
    if num_blocks < 2:
        raise DeviceUnavailable(
            f"the KV cache may take {budget / _MIB:.3g} MiB ({free // _MIB} MiB are free), but two blocks need "
            f"{2 * block_bytes / _MIB:.3g} MiB; raise --max_cache_size or lower --block_size"
        )
    tokens = num_blocks * cache.block_size
    lines = [
        f"memory: {free // _MIB} of {total // _MIB} MiB free after the weights",
        f"KV cache: {num_blocks} blocks of {cache.block_size} tokens = {num_blocks * block_bytes // _MIB} MiB "
        f"({why}), room for {tokens} tokens at {token_bytes} bytes each",
    ]
    if tokens < max_len:
        lines.append(
            f"warning: less than one sequence of {max_len} tokens fits; longer prompts are refused. "
            "Raise --max_cache_size"
        )
    return _Sizing(num_blocks, tuple(lines))


def model_fingerprint(folder: Path, dtype: torch.dtype, variant: str = "") -> str:
    """Hash of config, weight files by name, size and samples, tokenizer and template (SPEC 4.2).

    variant: what the flags make of the files beyond the dtype; instances that differ in it share no KV.

    The samples tell a fine-tuned checkpoint from its base, whose files have the same names and sizes.
    """
    parts = [f"{dtype} {variant}".rstrip()]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        parts.append(hashlib.blake2b(path.read_bytes()).hexdigest() if path.exists() else "")
    files = sorted(folder.glob("*.safetensors*"))
    return fingerprint(*parts, *(f"{path.name}:{_sampled(path)}" for path in files))


def _sampled(path: Path) -> str:
    """Size, and a hash of pieces spread over the file."""
    size, hashed = path.stat().st_size, hashlib.blake2b()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            hashed.update(file.read(_SAMPLE_BYTES))
    return f"{size}:{hashed.hexdigest()}"
