"""The toy executor: no torch, and a next token that depends on what its blocks hold.

Its KV cache is real memory: each computed token is written into its slot in every layer and part as two numbers, and the next
token is a CRC over what the block table READS BACK of the whole context. A wrong block id, a lost block, a stale share or a bad
handoff changes the text, so scheduler, handoff and transport are tested for content in milliseconds.

Sampling parameters take part in the same way: penalties mix in the tokens that the row was told and drew, a bias its pairs, a seed
its position and choice, so that a row with a stale history or with its neighbour's parameters says something else. How likely a
token was is read off the same CRC.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_py.base.hashing import fingerprint
from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.config import EngineConfig, ModelFacts
from xllm_py.core.executor import Capacity, Finish, LayerDone
from xllm_py.core.kv_memory import PARTS, KvLayout, KvMemory
from xllm_py.core.kv_plan import Share
from xllm_py.core.plan import RowStart, StepPlan, StepResult
from xllm_py.core.sampling import SamplingParams

VOCAB_SIZE = 320  # the bytes and room for special tokens
EOS = 319
MAX_MODEL_LEN = 4096
_LAYERS = 2
_SLOT_BYTES = 8  # token id and a mix of position, layer and part
_MIX = struct.Struct("<qqI")
_SHAPE = struct.Struct("<dddq")  # temperature, top_p, min_p, top_k
_PENALTIES = struct.Struct("<ddd")
_BIAS = struct.Struct("<qd")
_NO_GRAMMAR = "the toy executor follows no grammar; leave it out or serve a model"


@dataclass(slots=True)
class _Row:
    """What a row knows of its owner."""

    start: RowStart
    table: list[int]
    base: int  # CRC of what the owner's parameters say once for all tokens
    generated: list[int]  # kept only when the next token depends on it


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
        self._rows: dict[int, _Row] = {}
        self._drawn: list[int] = []  # in the step computed last

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

    def kv_share(self) -> Share:
        """See Executor."""
        return Share()

    def execute(self, plan: StepPlan, layer_done: LayerDone | None = None) -> StepResult:
        """See Executor."""
        return self.begin(plan, layer_done)()

    def begin(self, plan: StepPlan, layer_done: LayerDone | None = None) -> Finish:
        """See Executor; it computes at once."""
        if self._config.toy_step_s:
            time.sleep(self._config.toy_step_s)
        self._copy_blocks(plan)
        for start in plan.started:
            generated = list(start.generated_ids)
            self._rows[start.row] = _Row(start, list(start.block_ids), _base(start), generated)
        for row, block in zip(plan.grown_rows, plan.grown_blocks, strict=True):
            self._rows[row].table.append(block)
        for layer in range(_LAYERS):
            self._write(plan, layer)
            if layer_done is not None:
                layer_done(layer)
        result = self._draw_all(plan)
        self._drawn = result.token_ids
        return lambda: result

    def _draw_all(self, plan: StepPlan) -> StepResult:
        result = StepResult(token_ids=[])
        for index, number in enumerate(plan.rows):
            row, computed = self._rows[number], plan.num_computed[index]
            if row.start.sampling.grammar:
                result.failed_rows[number] = _NO_GRAMMAR
                result.token_ids.extend([-1] * plan.sample[index])
                continue
            if index in plan.targets:
                count = row.start.sampling.prompt_logprobs
                result.prompt_logprobs[index] = [
                    _judge(self._read(row, context), target, count)
                    for context, target in enumerate(plan.targets[index], start=computed + 1)
                ]
            if plan.sample[index]:
                self._draw(result, row, computed + plan.num_tokens[index], plan, index)
        return result

    def _draw(
        self, result: StepResult, row: _Row, context: int, plan: StepPlan, index: int
    ) -> None:
        """The tokens of one row, of which the first is the row's own."""
        sampling, position = row.start.sampling, plan.positions[index]
        crc = self._read(row, context)
        if sampling.penalised:
            crc = _mix_ids(row.generated, crc)
        crc ^= row.base
        for draw in range(plan.sample[index]):
            token = _choose(crc, row.start, position, draw)
            if sampling.logprobs >= 0:
                entry = len(result.token_ids)
                result.logprobs[entry] = _judge(crc, token, sampling.logprobs)
            result.token_ids.append(token)
        if sampling.penalised:
            row.generated.append(result.token_ids[-plan.sample[index]])

    def _copy_blocks(self, plan: StepPlan) -> None:
        assert not set(plan.copied_from) & set(plan.copied_to), "see Device.copy_blocks"
        for source, target in zip(plan.copied_from, plan.copied_to, strict=True):
            for layer in range(_LAYERS):
                for part in range(PARTS):
                    span = self._memory.span(layer, part, target)
                    span[:] = self._memory.span(layer, part, source)

    def _write(self, plan: StepPlan, layer: int) -> None:
        taken, known = 0, self._drawn if plan.carried else plan.token_ids
        for index, row in enumerate(plan.rows):
            count, first = plan.num_tokens[index], plan.num_computed[index]
            ids = known[taken : taken + count]
            taken += count
            table = self._rows[row].table
            for part in range(PARTS):
                slots = self._slots[layer * PARTS + part]
                for position, token in enumerate(ids, start=first):
                    block, offset = divmod(position, self._block_size)
                    at = (table[block] * self._block_size + offset) * 2
                    slots[at] = token
                    slots[at + 1] = position * 4 + layer * 2 + part

    def _read(self, row: _Row, context: int) -> int:
        """A hash of the whole context as the cache holds it."""
        table = row.table
        crc = 0
        full, rest = divmod(context, self._block_size)
        for layer in range(_LAYERS):
            for part in range(PARTS):
                for block in table[:full]:
                    crc = zlib.crc32(self._memory.span(layer, part, block), crc)
                if rest:
                    tail = self._memory.span(layer, part, table[full])[: rest * _SLOT_BYTES]
                    crc = zlib.crc32(tail, crc)
        return crc

    def close(self) -> None:
        """See Executor."""
        self._rows.clear()


def _base(start: RowStart) -> int:
    """What does not change from token to token; 0 for parameters that change no logit."""
    sampling = start.sampling
    crc = 0
    if sampling.penalised:
        values = (
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty,
        )
        crc = _mix_ids(start.prompt_ids, zlib.crc32(_PENALTIES.pack(*values), crc))
    for pair in sampling.logit_bias:
        crc = zlib.crc32(_BIAS.pack(*pair), crc)
    return crc


def _mix_ids(ids: Sequence[int], crc: int) -> int:
    return zlib.crc32(struct.pack(f"<{len(ids)}I", *ids), crc)


def _choose(crc: int, start: RowStart, position: int, draw: int) -> int:
    """The token, mixed with the seed unless greedy; before min_tokens the next one that ends nothing."""
    sampling = start.sampling
    if not sampling.greedy:
        crc = zlib.crc32(_MIX.pack(sampling.seed, position, start.choice + draw), crc)
        shape = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
        if shape != (1.0, 1.0, 0.0, -1):
            crc = zlib.crc32(_SHAPE.pack(*shape), crc)
    token = crc % VOCAB_SIZE
    while position < sampling.min_tokens and token in start.stop_ids:
        token = (token + 1) % VOCAB_SIZE
    return token


def _judge(crc: int, token: int, count: int) -> TokenLogprob:
    """How likely a token was and the `count` likeliest: the greedy one leads, those behind it follow by an eighth each.

    All are multiples of 2^-7 near zero: exact in any float, in any order of adding.
    """
    best = crc % VOCAB_SIZE
    highest = -((crc >> 9) % 1024) / 128
    count = min(count, VOCAB_SIZE)
    return TokenLogprob(
        logprob=highest - (token - best) % VOCAB_SIZE / 8,
        top_ids=tuple((best + rank) % VOCAB_SIZE for rank in range(count)),
        top_logprobs=tuple(highest - rank / 8 for rank in range(count)),
    )


@dataclass(slots=True)
class Lone:
    """What the toy says to a prompt computed alone and whole."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]  # one per token when asked for
    prompt_logprobs: list[TokenLogprob]  # from the second token on when asked for


def lone_run(
    executor: ToyExecutor, prompt: Sequence[int], sampling: SamplingParams, choice: int = 0
) -> Lone:
    """The oracle: max_tokens tokens of one choice, stop tokens or not."""
    count = sampling.max_tokens
    blocks = -(-(len(prompt) + count) // executor.kv_memory().layout.block_size)
    stops = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,)))
    start = RowStart(
        row=0,
        request_id="oracle",
        block_ids=tuple(range(blocks)),
        sampling=sampling,
        stop_ids=frozenset(stops),
        choice=choice,
        prompt_ids=tuple(prompt) if sampling.has_history else (),
    )
    known = list(prompt)
    said = Lone([], [], [])
    computed = 0
    for position in range(count):
        fresh = known[computed:]
        scored = sampling.prompt_logprobs >= 0 and position == 0
        plan = StepPlan(
            step=position,
            started=(start,) if position == 0 else (),
            rows=[0],
            num_tokens=[len(fresh)],
            num_computed=[computed],
            token_ids=fresh,
            sample=[1],
            positions=[position],
            targets={0: known[1:]} if scored else {},
        )
        computed = len(known)
        result = executor.execute(plan)
        known += result.token_ids
        said.logprobs += result.logprobs.values()
        said.prompt_logprobs += result.prompt_logprobs.get(0, [])
    said.token_ids = known[len(prompt) :]
    return said


def lone_answer(
    executor: ToyExecutor, prompt: Sequence[int], count: int, seed: int = 0, choice: int = 0
) -> list[int]:
    """The tokens of `lone_run` with no parameter but a seed, greedy when it is 0."""
    sampling = SamplingParams(max_tokens=count, temperature=1.0 if seed else 0.0, seed=seed)
    return lone_run(executor, prompt, sampling, choice).token_ids
