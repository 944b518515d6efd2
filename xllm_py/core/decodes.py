"""The common case of a step: requests that decode, one token each, with room in their last block. The only hot loops of the scheduler.

Used by the batch (plan) and the scheduler (apply). They differ from the general case in nothing but their cost: whole columns are
made at once, and what happens rarely is found by one comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.request import Request


def split(running: Iterable[Request], block_size: int) -> tuple[list[Request], list[Request]]:
    """Those that need nothing to decode their next token, and the others; the order stays."""
    ready: list[Request] = []
    others: list[Request] = []
    for request in running:
        start = request.num_computed
        if (
            len(request.tokens) - start == 1
            and request.row >= 0
            and request.first_ids
            and start < len(request.block_ids) * block_size
        ):
            ready.append(request)
        else:
            others.append(request)
    return ready, others


def plan(plan: StepPlan, ready: Sequence[Request]) -> None:
    """A row of one token and one draw for each."""
    ones = [1] * len(ready)
    plan.num_tokens.extend(ones)
    plan.sample.extend(ones)
    plan.rows.extend([request.row for request in ready])
    plan.num_computed.extend([request.num_computed for request in ready])
    plan.token_ids.extend([request.tokens[-1] for request in ready])
    plan.positions.extend([len(request.tokens) - request.num_prompt for request in ready])


def apply(
    ready: Sequence[Request], positions: Sequence[int], token_ids: Sequence[int], outputs: Outputs
) -> list[tuple[int, Request]]:
    """Give each its token, and an entry of the outputs; all of them still run, in the rows they had.

    positions: of the tokens, 0 = first generated. Returns the entries of those to look at: the answer ends, or a block is full.
    """
    notable: list[tuple[int, Request]] = []
    entry = len(outputs.request_ids)
    for request, token in zip(ready, token_ids, strict=True):
        request.tokens.append(token)
        computed = request.num_computed = request.num_computed + 1
        if computed >= request.look_at or token in request.stop_ids:
            notable.append((entry, request))
        entry += 1
    submissions = [request.submission for request in ready]
    outputs.request_ids.extend([submission.request_id for submission in submissions])
    outputs.attempts.extend([submission.attempt for submission in submissions])
    outputs.choices.extend([request.choice for request in ready])
    outputs.positions.extend(positions)
    outputs.token_ids.extend(token_ids)
    outputs.finish_reasons.extend([""] * len(ready))
    return notable
