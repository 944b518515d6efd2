"""Frozen slices of configuration for the engine side; each component gets only its own.

They are made from the command line by the API process and travel to the engine process once, at its start. Plain types
only. What is learnt later (number of blocks, end tokens) is a return value, never written back here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_py.core.service_config import TlsSlice

AUTO_DEVICE = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How much KV cache there is and how it is cut."""

    block_size: int = 128  # tokens per block
    max_cache_bytes: int = 0  # 0: computed from the memory at hand
    max_memory_utilization: float = 0.8
    enable_prefix_cache: bool = True  # keep computed blocks for requests that begin alike
    prefix_seed: int = 1024  # enters the root of all block hashes
    poison: bool = (
        False  # fill blocks with nonsense before they are used, check all of them before each step
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Budgets of one step and the limits of the waiting queue."""

    max_tokens_per_batch: int = 10240
    max_seqs_per_batch: int = 200
    enable_chunked_prefill: bool = True
    mix_batch: bool = True  # prompts and decodes in one step; else prompts go first
    max_tokens_per_chunk: int = 10240
    max_queue: int = 100_000  # waiting requests
    priority_strategy: str = "fcfs"  # fcfs, priority or deadline
    online_preempts_offline: bool = True  # offline requests give way to those that are not
    prefill_usage_threshold: float = 0.95  # no new prefill above this share of used blocks
    zero_evict: bool = False  # admit only what can grow to its end, so that nobody is preempted
    grant_ttl_s: float = 30.0  # a reservation without a sign of life ends after so long
    handoff_hold_s: float = 5.0  # not read yet; P is to keep a refused request's KV so long
    enable_local_decode: bool = True  # P may decode a request that no D takes
    overlap: bool = False  # begin the next step of decodes while one is computed
    kv_pull: bool = False  # D fetches the KV of what we offer; else we push it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the scheduler has to know of the model; learnt when it is loaded."""

    vocab_size: int
    max_model_len: int  # tokens of prompt and answer together
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksConfig:
    """Where this process stands among those that compute one model together (SPEC 6.10)."""

    nnodes: int = 1
    node_rank: int = 0
    expert_groups: int = 1  # --ep_size: how many the ranks form, each with whole experts of its own
    place: int = 0  # among the ranks of its node; 0 starts the others
    address: str = ""  # host:port where all meet; empty on one node: rank 0 chooses
    patience_s: float = 60.0  # how long the others are waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine process is told at its start."""

    executor: str = "model"  # "model", or "toy": no torch, next token is a hash of the cache
    model_path: str = ""
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str = ""  # or "w8a8"
    failpoints: str = ""  # base/failpoints, of this daemon's processes
    profile_to: str = ""  # a file: steps are timed and written there before anything else
    max_model_len: int = 0
    logprobs_mode: str = "raw"  # or "processed": after penalties, bias, temperature and cuts
    is_exact: bool = True  # --enable_deterministic
    devices: tuple[str, ...] = (
        "cpu:0",
    )  # of this node, one a rank; AUTO_DEVICE: the best that is there
    ranks: RanksConfig = field(default_factory=RanksConfig)
    cpu_threads: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    incarnation: str = ""
    kv_host: str = "127.0.0.1"
    kv_advertise_host: str = ""  # where peers reach it; empty: at kv_host
    kv_port: int = 0  # 0: any free port
    kv_listen: bool = False  # an instance with a role other than DEFAULT moves KV
    kv_transport: str = (
        "tcp"  # or "auto": shared memory between engines of one host; "nixl", "mooncake"
    )
    kv_streams: int = 1  # TCP connections to one peer
    kv_first_stream: int = 0  # their numbers count from here: engines of one instance must differ
    kv_port_may_move: bool = True  # take the next free port when this one is busy (SPEC 1.1)
    cluster_key: bytes = b""
    kv_tls: TlsSlice | None = None  # of the KV port
    toy_step_s: float = 0.0  # how long the toy executor pretends to compute a step
    toy_num_blocks: int = 256

    @property
    def num_ranks(self) -> int:
        """Of the instance, on all its nodes."""
        return self.ranks.nnodes * len(self.devices)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return self.ranks.node_rank * len(self.devices) + self.ranks.place

    log_level: str = "info"
    log_format: str = "text"
