"""The real Executor: opens the device, reads the model, sizes the KV cache, and computes steps on one rank or several.

Called by engine/__main__, inside a function, because this is where torch comes in. Of several ranks each computes its share of every step
(model/sharding); rank 0 alone plans, samples and speaks to others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from xllm_py.base import log
from xllm_py.base.errors import DeviceUnavailable, UsageError
from xllm_py.base.hashing import fingerprint
from xllm_py.base.process import num_cores
from xllm_py.core.config import EngineConfig, ModelFacts
from xllm_py.core.executor import Capacity, Executor, Finish, LayerDone
from xllm_py.core.kv_memory import KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.core.plan import StepPlan, StepResult
from xllm_py.device import open_device
from xllm_py.device.base import Device, KvShape
from xllm_py.device.collectives import Collectives
from xllm_py.engine.grammar import Matchers
from xllm_py.engine.kv_port import announced, open_port
from xllm_py.engine.rank_group import OnLost, RankGroup, end_process
from xllm_py.engine.self_test import numerics_fingerprint
from xllm_py.engine.worker import Worker
from xllm_py.model import Model, load_model, open_weights, pick_dtype, read_config
from xllm_py.model.config import ModelConfig
from xllm_py.model.fingerprint import model_fingerprint
from xllm_py.model.sharding import Shard
from xllm_py.transport.pipe import decode_plan, encode_plan
from xllm_py.transport.rank_line import RankLine
from xllm_py.transport.rank_servant import Progress, RankServant

_CPU_CACHE_BYTES = 4 << 30
_MIB = 1 << 20

_log = log.get(__name__)


def open_executor(config: EngineConfig, on_lost: OnLost = end_process) -> Executor:
    """Load everything. Raises StartError leaves with cause and fix in one line.

    on_lost: another rank of this instance ended; it ends this process.
    """
    loading = _Loading(config)
    if config.num_ranks == 1:
        worker = loading.worker(_load(loading, Shard()), chooses=True)
        return OneRank(worker, loading, loading.capacity(worker))
    return _lead(loading, on_lost)


def _lead(loading: _Loading, on_lost: OnLost) -> Executor:
    """Rank 0 of several."""
    group, ranks, shard = _join(loading, on_lost)
    worker = loading.worker(_load(loading, shard, ranks), chooses=True)
    others = Others(group, ranks, group.kv_lines())
    worker.tell = others.tell
    return ManyRanks(worker, loading, loading.capacity(worker), others)


def follow(config: EngineConfig, on_lost: OnLost, on_ready: Callable[[], None]) -> None:
    """Another rank than 0: load its share, then compute what rank 0 plans, until that says that it is over."""
    loading = _Loading(config)
    group, ranks, shard = _join(loading, on_lost)
    worker = loading.worker(_load(loading, shard, ranks), chooses=False)
    progress = Progress()
    servant = _serve_kv(loading, group, progress) if config.kv_listen else None
    on_ready()
    try:
        while raw := ranks.hear():
            progress.begin()
            worker.execute(decode_plan(raw), progress.stored)
    except Exception as error:
        group.end(error)
        raise
    finally:
        if servant is not None:
            servant.join()
        group.close()
        worker.close()
        loading.device.close()


def _serve_kv(loading: _Loading, group: RankGroup, progress: Progress) -> RankServant:
    """Another rank than 0: open its KV port, and have rank 0 direct it."""
    config = replace(loading.config, incarnation=group.incarnation())
    memory = loading.device.kv_memory()
    transport = open_port(config, memory, loading.kv_share)
    servant = RankServant(
        line=group.kv_line(), transport=transport, memory=memory, progress=progress
    )
    servant.start(config.rank, announced(config, transport))
    return servant


def _join(loading: _Loading, on_lost: OnLost) -> tuple[RankGroup, Collectives, Shard]:
    """Meet the other ranks."""
    config = loading.config
    group = RankGroup(config, on_lost)
    store = group.gather(loading.facts())
    ranks = Collectives(store, config.rank, config.num_ranks, loading.device.collectives)
    shard = Shard(
        rank=config.rank,
        count=config.num_ranks,
        expert_groups=config.ranks.expert_groups,
        ranks=ranks,
    )
    return group, ranks, shard


def _load(loading: _Loading, shard: Shard, ranks: Collectives | None = None) -> Model:
    """The model, and the cache, of as many blocks as every rank has room for."""
    config, device = loading.config, loading.device
    model = load_model(
        loading.model,
        device,
        open_weights(loading.folder, loading.dtype, config.load_format),
        max_position=loading.max_len,
        quantization=config.quantization,
        shard=shard,
    )
    shape = loading.kv_shape(shard)
    loading.sizing = _size_cache(config, shape, device, loading.max_len)
    if ranks is not None:
        loading.sizing = replace(loading.sizing, num_blocks=ranks.least(loading.sizing.num_blocks))
    device.alloc_kv(loading.kv_shape(shard))
    return model


class _Loading:
    """What is known while one rank is opened."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.folder = Path(config.model_path)
        self.model = read_config(self.folder)
        self.max_len = _longest(config, self.model)
        self.dtype = pick_dtype(config.dtype, self.model)
        self.sizing = _Sizing(0, ())
        Shard(count=config.num_ranks, expert_groups=config.ranks.expert_groups).check(self.model)

    @cached_property
    def device(self) -> Device:
        """Opened at first use: the others may have to be met before."""
        config, local = self.config, len(self.config.devices)
        threads = config.cpu_threads
        if not threads and local > 1:
            threads = max(1, num_cores() // local)  # ranks of one host share its cores
        name = config.devices[config.ranks.place]
        return open_device(name, threads=threads, is_exact=config.is_exact)

    @property
    def kv_share(self) -> Share:
        """Which of the model's KV heads this rank has."""
        config = self.config
        return Share(
            rank=config.rank, num_ranks=config.num_ranks, num_heads=self.model.num_kv_heads
        )

    @property
    def variant(self) -> str:
        """What the flags make of the files beyond the dtype."""
        words = (self.model.rope.variant(self.max_len), self.config.quantization)
        return " ".join(filter(None, words))

    def facts(self) -> dict[str, str]:
        """What all ranks must have in common."""
        config = self.config
        return {
            "model": model_fingerprint(self.folder, self.dtype, self.variant),
            "--nnodes": str(config.ranks.nnodes),
            "--ep_size": str(config.ranks.expert_groups),
            "--enable_deterministic": str(config.is_exact).lower(),
            "number of --devices": str(len(config.devices)),
            "device type": config.devices[0].partition(":")[0],
            "--block_size": str(config.cache.block_size),
            "--max_model_len": str(self.max_len),
            "--max_seqs_per_batch": str(config.scheduler.max_seqs_per_batch),
            "--enable_disagg_pd": str(config.kv_listen).lower(),
            "--cluster_key_file": fingerprint(config.cluster_key.hex()) if config.kv_listen else "",
        }

    def kv_shape(self, shard: Shard) -> KvShape:
        """Of this rank's cache."""
        return KvShape(
            num_layers=self.model.num_layers,
            num_blocks=self.sizing.num_blocks,
            block_size=self.config.cache.block_size,
            kv_heads=len(shard.heads(self.model)[1]),
            head_dim=self.model.head_dim,
            dtype=self.dtype,
        )

    def worker(self, model: Model, *, chooses: bool) -> Worker:
        """chooses: it samples."""
        config, shape = self.config, self.model
        matchers = Matchers(self.folder, shape.vocab_size, shape.eos_token_ids) if chooses else None
        return Worker(
            model,
            self.device,
            max_seqs=config.scheduler.max_seqs_per_batch,
            max_blocks=-(-self.max_len // config.cache.block_size),
            block_size=config.cache.block_size,
            matchers=matchers,
            logprobs_mode=config.logprobs_mode,
        )

    def capacity(self, worker: Worker) -> Capacity:
        """What the executor offers; computes the self-test."""
        config, device = self.config, self.device
        groups = config.ranks.expert_groups
        ranks = f" {config.num_ranks} ranks" if config.num_ranks > 1 else ""
        ranks += f" {groups} groups" if groups > 1 else ""
        return Capacity(
            num_blocks=self.sizing.num_blocks,
            block_size=config.cache.block_size,
            max_seqs=config.scheduler.max_seqs_per_batch,
            facts=ModelFacts(
                vocab_size=self.model.vocab_size,
                max_model_len=self.max_len,
                eos_token_ids=self.model.eos_token_ids,
            ),
            dtype=str(self.dtype).removeprefix("torch."),
            device=device.name if not ranks else ",".join(config.devices),
            model_fingerprint=model_fingerprint(self.folder, self.dtype, self.variant),
            numerics_fingerprint=numerics_fingerprint(
                worker,
                self.model.vocab_size,
                self.max_len,
                self.sizing.num_blocks,
                config.cache.block_size,
                device.variant() + ranks,
            ),
            summary=self.sizing.summary,
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

    def __init__(self, worker: Worker, loading: _Loading, capacity: Capacity) -> None:
        self.worker = worker
        self._device = loading.device
        self._share = loading.kv_share
        self._capacity = capacity

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        """See Executor."""
        return self.begin(plan, layer_done)()

    def begin(self, plan: StepPlan, layer_done: LayerDone | None = None) -> Finish:
        """See Executor."""
        return self.worker.begin(plan, layer_done)

    def capacity(self) -> Capacity:
        """See Executor."""
        return self._capacity

    def kv_memory(self) -> KvMemory:
        """See Executor."""
        return self._device.kv_memory()

    def kv_share(self) -> Share:
        """See Executor."""
        return self._share

    def close(self) -> None:
        """See Executor."""
        self.worker.close()
        self._device.close()


class Others:
    """The other ranks, as rank 0 speaks to them."""

    def __init__(self, group: RankGroup, ranks: Collectives, kv_lines: list[RankLine]) -> None:
        self.group = group
        self.ranks = ranks
        self.kv_lines = kv_lines  # to their KV transports, where this instance hands over

    def tell(self, plan: StepPlan) -> None:
        """The next plan, before it is computed."""
        for line in self.kv_lines:
            line.step += 1
        self.ranks.tell(encode_plan(plan))


class ManyRanks(OneRank):
    """Implements core.executor.Executor: rank 0, which tells the others each plan before it computes its own share."""

    def __init__(
        self, worker: Worker, loading: _Loading, capacity: Capacity, others: Others
    ) -> None:
        super().__init__(worker, loading, capacity)
        self.others = others

    def begin(self, plan: StepPlan, layer_done: LayerDone | None = None) -> Finish:
        """See Executor; it waits, and takes no carried plan. A step that fails in its middle leaves the ranks at different places, and ends them all."""
        try:
            result = super().begin(plan, layer_done)()
        except Exception as error:
            self.others.group.end(error)
            raise
        return lambda: result

    def close(self) -> None:
        """See Executor."""
        for line in self.others.kv_lines:
            line.close()
        self.others.ranks.tell(b"")
        self.others.group.close()
        self.others.ranks.close()
        super().close()


@dataclass(frozen=True, slots=True)
class _Sizing:
    num_blocks: int
    summary: tuple[str, ...]


def _size_cache(config: EngineConfig, shape: KvShape, device: Device, max_len: int) -> _Sizing:
    """How many blocks fit, and why, in plain words."""
    cache = config.cache
    token_bytes = (
        2 * shape.num_layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    )  # on this rank
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
