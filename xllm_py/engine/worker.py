"""One rank: model, cache and the tables of the batch rows. Turns a StepPlan into tensors, runs the model, samples.

Made by engine/ranks. Row tables are written in place as plans tell what changed; a row that gets a new owner is built whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from xllm_py.core.executor import LayerDone
from xllm_py.core.plan import RowStart, StepPlan, StepResult
from xllm_py.device.base import AttentionBatch, Device
from xllm_py.engine.sampler import sample
from xllm_py.model import Model

Observer = Callable[[list[str], list[int], Tensor], None]


class Worker:
    """Owns the row tables."""

    def __init__(
        self, model: Model, device: Device, *, max_seqs: int, max_blocks: int, block_size: int
    ) -> None:
        self._model = model
        self._device = device
        self._block_size = block_size
        self._padding = device.row_padding()
        self._tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int32)
        self._num_blocks = [0] * max_seqs
        self._rows: list[RowStart | None] = [None] * max_seqs
        self.observer: Observer | None = (
            None  # tests compare logits with it: request ids, positions, logits
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan, layer_done: LayerDone | None) -> StepResult:
        """See core.executor.Executor.execute."""
        if plan.copied_to:
            self._device.copy_blocks(plan.copied_from, plan.copied_to)
        self._update_rows(plan)
        token_ids, positions, batch = self._inputs(plan)
        hidden = self._model.forward(token_ids, positions, batch, layer_done)
        due = [index for index, draws in enumerate(plan.sample) if draws]
        if not due:
            return StepResult(token_ids=[])
        last = [batch.first_tokens[i] + batch.num_tokens[i] - 1 for i in due]
        logits = self._model.logits(hidden[torch.tensor(last)])
        starts = [self._start(plan.rows[index]) for index in due]
        places = [plan.positions[index] for index in due]
        if self.observer is not None:
            self.observer([start.request_id for start in starts], places, logits)
        return self._sample(logits, plan, due, starts, places)

    def _sample(
        self,
        logits: Tensor,
        plan: StepPlan,
        due: list[int],
        starts: list[RowStart],
        places: list[int],
    ) -> StepResult:
        """A row whose logits are no numbers fails alone."""
        broken = (~torch.isfinite(logits).all(-1)).tolist()
        cause = "the model's output is not finite"
        failed = {plan.rows[due[i]]: cause for i, bad in enumerate(broken) if bad}
        drawn = [i for i, index in enumerate(due) for _ in range(plan.sample[index])]
        if len(drawn) > len(due):
            logits = logits[torch.tensor(drawn)]
            starts = [
                each for i, start in enumerate(starts) for each in _draws(start, plan, due[i])
            ]
            places = [places[i] for i in drawn]
        tokens = sample(logits, starts, places)
        if failed:
            tokens = [-1 if broken[i] else token for i, token in zip(drawn, tokens, strict=True)]
        return StepResult(token_ids=tokens, failed_rows=failed)

    def _start(self, row: int) -> RowStart:
        start = self._rows[row]
        if start is None:
            raise ValueError(f"row {row} was planned before it was started")
        return start

    def _update_rows(self, plan: StepPlan) -> None:
        for start in plan.started:
            count = len(start.block_ids)
            self._rows[start.row] = start
            self._num_blocks[start.row] = count
            self._tables[start.row, :count] = torch.tensor(start.block_ids, dtype=torch.int32)
        if plan.grown_rows:
            columns = []
            for row in plan.grown_rows:
                columns.append(self._num_blocks[row])
                self._num_blocks[row] += 1
            where = (torch.tensor(plan.grown_rows), torch.tensor(columns))
            self._tables[where] = torch.tensor(plan.grown_blocks, dtype=torch.int32)

    def _inputs(self, plan: StepPlan) -> tuple[Tensor, Tensor, AttentionBatch]:
        counts = torch.tensor(plan.num_tokens)
        computed = torch.tensor(plan.num_computed)
        ends = counts.cumsum(0)
        firsts = ends - counts
        total = len(plan.token_ids)
        positions = torch.arange(total) + torch.repeat_interleave(computed - firsts, counts)
        widest = -(-int((computed + counts).max()) // self._block_size)
        tables = self._tables[torch.tensor(plan.rows), :widest]
        sequence = torch.repeat_interleave(torch.arange(len(plan.rows)), counts)
        blocks = tables[sequence, positions // self._block_size].long()
        slots = blocks * self._block_size + positions % self._block_size
        batch = AttentionBatch(
            block_tables=tables,
            first_tokens=firsts.tolist(),
            num_tokens=plan.num_tokens,
            context_tokens=(computed + counts).tolist(),
            slots=slots,
        )
        padding = (0, -total % self._padding)
        token_ids = functional.pad(torch.tensor(plan.token_ids), padding)
        return token_ids, functional.pad(positions, padding), batch


def _draws(start: RowStart, plan: StepPlan, index: int) -> list[RowStart]:
    """The row once per choice that draws its first token from the same logits."""
    return [
        dataclasses.replace(start, choice=start.choice + draw) for draw in range(plan.sample[index])
    ]
