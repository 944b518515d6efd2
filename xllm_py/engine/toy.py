"""The toy executor: no torch, and a next token that depends on what its blocks hold.

Its KV cache is real memory: each computed token is written into its slot in every layer and part as two numbers, and the next
token is a CRC over what the block table READS BACK of the whole context. A wrong block id, a lost block, a stale share or a bad
handoff changes the text, so scheduler, handoff and transport are tested for content in milliseconds.
"""

from __future__ import annotations

import struct
import time
import zlib

from xllm_py.base.hashing import fingerprint
from xllm_py.core.config import EngineConfig, ModelFacts
from xllm_py.core.executor import Capacity, LayerDone
from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.core.plan import RowStart, StepPlan, StepResult
from xllm_py.core.sampling import SamplingParams

VOCAB_SIZE = 320  # the bytes and room for special tokens
EOS = 319
MAX_MODEL_LEN = 4096
_LAYERS = 2
_SLOT_BYTES = 8  # token id and a mix of position, layer and part
_MIX = struct.Struct("<qqI")


class ToyExecutor:
    """Implements core.executor.Executor."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        size = config.cache.block_size
        self._block_size = size
        self._num_blocks = config.toy_num_blocks
        self._layout = KvLayout(
            num_layers=_LAYERS, block_size=size, block_bytes=size * _SLOT_BYTES, shape="toy"
        )
        memory = self._num_blocks * self._layout.block_bytes
        self._regions = [memoryview(bytearray(memory)) for _ in range(_LAYERS * PARTS)]
        self._memory = KvMemory(self._layout, self._num_blocks, self._regions)
        self._slots = [region.cast("i") for region in self._regions]
        self._rows: dict[int, tuple[RowStart, list[int]]] = {}

    def capacity(self) -> Capacity:
        """See Executor."""
        longest = self._config.max_model_len or MAX_MODEL_LEN
        return Capacity(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_seqs=self._config.scheduler.max_seqs_per_batch,
            facts=ModelFacts(vocab_size=VOCAB_SIZE, max_model_len=longest, eos_token_ids=(EOS,)),
            dtype="int32",
            device="toy",
            model_fingerprint=fingerprint("toy"),
            numerics_fingerprint=fingerprint("toy"),
            summary=(f"toy executor with {self._num_blocks} blocks of {self._block_size} tokens",),
        )

    def kv_memory(self) -> KvMemory:
        """See Executor."""
        return self._memory

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        """See Executor."""
        if self._config.toy_step_s:
            time.sleep(self._config.toy_step_s)
        self._copy_blocks(plan)
        for start in plan.started:
            self._rows[start.row] = (start, list(start.block_ids))
        for row, block in zip(plan.grown_rows, plan.grown_blocks, strict=True):
            self._rows[row][1].append(block)
        for layer in range(_LAYERS):
            self._write(plan, layer)
            if layer_done is not None:
                layer_done(layer)
        tokens = []
        for index, row in enumerate(plan.rows):
            for draw in range(plan.sample[index]):
                context = plan.num_computed[index] + plan.num_tokens[index]
                tokens.append(self._next(row, context, plan.positions[index], draw))
        return StepResult(token_ids=tokens)

    def _copy_blocks(self, plan: StepPlan) -> None:
        for source, target in zip(plan.copied_from, plan.copied_to, strict=True):
            for layer in range(_LAYERS):
                for part in range(PARTS):
                    span = self._memory.span(layer, part, target)
                    span[:] = self._memory.span(layer, part, source)

    def _write(self, plan: StepPlan, layer: int) -> None:
        taken = 0
        for index, row in enumerate(plan.rows):
            count, first = plan.num_tokens[index], plan.num_computed[index]
            ids = plan.token_ids[taken : taken + count]
            taken += count
            table = self._rows[row][1]
            for part in range(PARTS):
                slots = self._slots[layer * PARTS + part]
                for position, token in enumerate(ids, start=first):
                    block, offset = divmod(position, self._block_size)
                    at = (table[block] * self._block_size + offset) * 2
                    slots[at] = token
                    slots[at + 1] = position * 4 + layer * 2 + part

    def _next(self, row: int, context: int, position: int, draw: int) -> int:
        """A hash of the whole context as the cache holds it, mixed with the seed unless greedy."""
        start, table = self._rows[row]
        choice = start.choice + draw
        crc = 0
        full, rest = divmod(context, self._block_size)
        for layer in range(_LAYERS):
            for part in range(PARTS):
                for block in table[:full]:
                    crc = zlib.crc32(self._memory.span(layer, part, block), crc)
                if rest:
                    tail = self._memory.span(layer, part, table[full])[: rest * _SLOT_BYTES]
                    crc = zlib.crc32(tail, crc)
        if not start.sampling.greedy:
            crc = zlib.crc32(_MIX.pack(start.sampling.seed, position, choice), crc)
        return crc % VOCAB_SIZE

    def close(self) -> None:
        """See Executor."""
        self._rows.clear()


def lone_answer(
    executor: ToyExecutor, prompt: list[int], count: int, seed: int = 0, choice: int = 0
) -> list[int]:
    """The oracle: what the toy says to a prompt computed alone and whole, greedy when seed is 0."""
    blocks = -(-(len(prompt) + count) // executor.kv_memory().layout.block_size)
    start = RowStart(
        row=0,
        request_id="oracle",
        block_ids=tuple(range(blocks)),
        sampling=SamplingParams(max_tokens=count, temperature=1.0 if seed else 0.0, seed=seed),
        choice=choice,
    )
    known = list(prompt)
    computed = 0
    for position in range(count):
        fresh = known[computed:]
        plan = StepPlan(
            step=position,
            started=(start,) if position == 0 else (),
            rows=[0],
            num_tokens=[len(fresh)],
            num_computed=[computed],
            token_ids=fresh,
            sample=[1],
            positions=[position],
        )
        computed = len(known)
        known += executor.execute(plan).token_ids
    return known[len(prompt) :]
