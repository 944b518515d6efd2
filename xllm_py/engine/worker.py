"""One rank: model, cache and the tables of the batch rows. Turns a StepPlan into tensors, runs the model, samples.

Made by engine/ranks. Row tables are written in place as plans tell what changed; a row that gets a new owner is built whole.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from xllm_py.core.executor import Finish, LayerDone
from xllm_py.core.plan import RowStart, StepPlan, StepResult
from xllm_py.device.base import AttentionBatch, Device
from xllm_py.engine.grammar import Matchers
from xllm_py.engine.judge import judge
from xllm_py.engine.sampler import Drawn, Sampler, merged
from xllm_py.model import Model

Observer = Callable[[list[str], list[int], Tensor], None]

_NOT_FINITE = "the model's output is not finite"
_JUDGED_AT_ONCE = 256  # tokens of a prompt


class Worker:
    """Owns the row tables."""

    def __init__(
        self,
        model: Model,
        device: Device,
        *,
        max_seqs: int,
        max_blocks: int,
        block_size: int,
        matchers: Matchers | None,
        logprobs_mode: str = "raw",
    ) -> None:
        """matchers: None on ranks that compute and do not choose."""
        self._model = model
        self._device = device
        self._block_size = block_size
        self._padding = device.row_padding()
        self._tables = np.zeros((max_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * max_seqs
        self._rows: list[RowStart | None] = [None] * max_seqs
        self._sampler = Sampler(
            max_seqs=max_seqs,
            vocab_size=model.config.vocab_size,
            logprobs_mode=logprobs_mode,
            draw=device.draw,
        )
        self._matchers = matchers
        self._best: Tensor | None = None  # of the rows of the step begun last, on the device
        self.tell: Callable[[StepPlan], None] | None = None  # the other ranks, before each step
        self.observer: Observer | None = (
            None  # tests compare logits with it: request ids, positions, logits
        )

    def execute(self, plan: StepPlan, layer_done: LayerDone | None) -> StepResult:
        """See core.executor.Executor.execute."""
        return self.begin(plan, layer_done)()

    @torch.inference_mode()
    def begin(self, plan: StepPlan, layer_done: LayerDone | None) -> Finish:
        """See core.executor.Executor.begin."""
        if self.tell is not None:
            self.tell(plan)
        if plan.copied_to:
            self._device.copy_blocks(plan.copied_from, plan.copied_to)
        self._update_rows(plan)
        if self._matchers is not None:
            self._matchers.begin(
                [row for row, draws in zip(plan.rows, plan.sample, strict=True) if draws]
            )
        token_ids, positions, batch = self._inputs(plan)
        hidden = self._model.forward(token_ids, self._device.put(positions), batch, layer_done)
        result = StepResult(token_ids=[])
        if plan.targets:
            self._judge_prompts(hidden, plan, batch, result)
        due = [index for index, draws in enumerate(plan.sample) if draws]
        if not due:
            return lambda: result
        if len(due) < len(hidden):  # not the last token of every row and nothing else
            hidden = hidden[(batch.first_tokens + batch.num_tokens)[torch.tensor(due)] - 1]
        logits = self._model.logits(hidden)
        matchers = self._matchers
        if matchers is None:
            return lambda: result
        starts = [self._start(plan.rows[index]) for index in due]
        if self.observer is not None:
            names = [start.request_id for start in starts]
            self.observer(names, [plan.positions[index] for index in due], logits.cpu())
        found = self._device.best(logits)
        self._best = found[:, 0]
        told = self._device.fetch(found)
        return lambda: self._sample(logits, told().tolist(), plan, due, result, matchers)

    def close(self) -> None:
        """End its threads."""
        if self._matchers is not None:
            self._matchers.close()

    @torch.inference_mode()
    def _sample(
        self,
        logits: Tensor,
        found: list[list[int]],
        plan: StepPlan,
        due: list[int],
        result: StepResult,
        matchers: Matchers,
    ) -> StepResult:
        """The tokens. A row whose logits are no numbers, or whose grammar cannot be followed, fails alone.

        logits: of a step that another one was begun behind they may be that one's by now; nobody looks at them then.
        """
        masks = matchers.take()
        result.failed_rows.update(masks.failed)
        for index, (_, good) in zip(due, found, strict=True):
            if not good:
                result.failed_rows[plan.rows[index]] = _NOT_FINITE
        best = [each for each, _ in found]
        going = [plan.rows[index] not in result.failed_rows for index in due]
        failed = [index for index, goes in zip(due, going, strict=True) if not goes]
        if failed:
            logits = logits[torch.tensor(going)]
            best = [each for each, goes in zip(best, going, strict=True) if goes]
            due = [index for index, goes in zip(due, going, strict=True) if goes]
        drawn = Drawn(token_ids=[])
        if due:
            drawn = self._draw(logits, best, plan, due, masks.allowed)
            self._tell_matchers(matchers, plan, due, drawn)
        if not failed:
            result.token_ids.extend(drawn.token_ids)
            result.logprobs.update(drawn.logprobs)
            return result
        lost, entry = set(failed), 0
        for index, draws in enumerate(plan.sample):
            if index in lost:
                result.token_ids.extend([-1] * draws)
                continue
            for _ in range(draws):
                if entry in drawn.logprobs:
                    result.logprobs[len(result.token_ids)] = drawn.logprobs[entry]
                result.token_ids.append(drawn.token_ids[entry])
                entry += 1
        return result

    def _draw(
        self,
        logits: Tensor,
        best: list[int],
        plan: StepPlan,
        due: list[int],
        allowed: dict[int, NDArray[np.bool_]],
    ) -> Drawn:
        """Logits come to the host for the rows that need them there."""
        rows, draws = [plan.rows[index] for index in due], [plan.sample[index] for index in due]
        tokens = [[token] * count for token, count in zip(best, draws, strict=True)]
        rest = [
            place
            for place, row in enumerate(rows)
            if row in allowed or not self._sampler.is_highest(row)
        ]
        if not rest:
            return Drawn(token_ids=[token for each in tokens for token in each])
        positions = [plan.positions[index] for index in due]
        if logits.device.type == "cpu":
            return self._sampler.choose(logits, rows, positions, draws, allowed, best)

        def of(column: list[int], places: list[int]) -> list[int]:
            return [column[place] for place in places]

        drawn = [
            place
            for place in rest
            if rows[place] not in allowed and self._sampler.only_draws(rows[place])
        ]
        if drawn:
            columns = of(rows, drawn), of(positions, drawn), of(draws, drawn)
            for place, said in zip(drawn, self._sampler.draw(logits, drawn, *columns), strict=True):
                tokens[place] = said
        rest = [place for place in rest if place not in set(drawn)]
        if not rest:
            return Drawn(token_ids=[token for each in tokens for token in each])
        chosen = self._sampler.choose(
            logits[torch.tensor(rest)].cpu(),
            of(rows, rest),
            of(positions, rest),
            of(draws, rest),
            allowed,
            of(best, rest),
        )
        return merged(tokens, rest, chosen)

    def _tell_matchers(
        self, matchers: Matchers, plan: StepPlan, due: list[int], drawn: Drawn
    ) -> None:
        """The first token of each row is its own."""
        entry = 0
        for index in due:
            matchers.told(plan.rows[index], drawn.token_ids[entry])
            entry += plan.sample[index]

    def _judge_prompts(
        self, hidden: Tensor, plan: StepPlan, batch: AttentionBatch, result: StepResult
    ) -> None:
        """How likely the prompt's own tokens were; a bounded number of rows of logits at a time."""
        for index, targets in plan.targets.items():
            top = self._start(plan.rows[index]).sampling.prompt_logprobs
            first = int(batch.first_tokens[index])
            said = result.prompt_logprobs[index] = []
            for begin in range(0, len(targets), _JUDGED_AT_ONCE):
                some = targets[begin : begin + _JUDGED_AT_ONCE]
                logits = self._model.logits(hidden[first + begin : first + begin + len(some)])
                if not self._device.best(logits)[:, 1].all():
                    result.failed_rows[plan.rows[index]] = _NOT_FINITE
                    break
                said += judge(logits.cpu(), range(len(some)), some, [top] * len(some))

    def _start(self, row: int) -> RowStart:
        start = self._rows[row]
        if start is None:
            raise ValueError(f"row {row} was planned before it was started")
        return start

    def _update_rows(self, plan: StepPlan) -> None:
        for start in plan.started:
            count = len(start.block_ids)
            self._rows[start.row] = start
            if self._matchers is not None:
                self._sampler.start(start)
                self._matchers.start(start)
            self._num_blocks[start.row] = count
            self._tables[start.row, :count] = start.block_ids
        if plan.grown_rows:
            columns = []
            for row in plan.grown_rows:
                columns.append(self._num_blocks[row])
                self._num_blocks[row] += 1
            self._tables[plan.grown_rows, columns] = plan.grown_blocks

    def _inputs(self, plan: StepPlan) -> tuple[Tensor, Tensor, AttentionBatch]:
        counts, computed = np.array(plan.num_tokens), np.array(plan.num_computed)
        contexts, ends = computed + counts, counts.cumsum()
        firsts = ends - counts
        total = int(ends[-1])
        padded = total + -total % self._padding
        positions = np.zeros(padded, dtype=np.int64)
        own, sequence = computed, np.arange(len(plan.rows))
        if total > len(plan.rows):  # not a token of each row
            sequence = np.repeat(sequence, counts)
            own = np.arange(total) + (computed - firsts)[sequence]
        positions[:total] = own
        tables = self._tables[plan.rows, : -(-int(contexts.max()) // self._block_size)]
        blocks, offsets = np.divmod(own, self._block_size)
        slots = tables[sequence, blocks].astype(np.int64) * self._block_size + offsets
        batch = AttentionBatch(
            block_tables=torch.from_numpy(tables),
            first_tokens=torch.from_numpy(firsts),
            num_tokens=torch.from_numpy(counts),
            context_tokens=torch.from_numpy(contexts),
            slots=torch.from_numpy(slots),
        )
        return self._tokens(plan, padded), torch.from_numpy(positions), batch

    def _tokens(self, plan: StepPlan, padded: int) -> Tensor:
        """Of a step, where the device computes; carried ones never leave it."""
        if plan.carried:
            assert self._best is not None
            return functional.pad(self._best, (0, padded - len(self._best))).contiguous()
        token_ids = np.zeros(padded, dtype=np.int64)
        token_ids[: len(plan.token_ids)] = plan.token_ids
        return self._device.put(torch.from_numpy(token_ids))
