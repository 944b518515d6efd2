"""What the toy says to a request that is computed alone and whole: the only right answer, wherever and however it was served."""

from __future__ import annotations

import dataclasses

from tests.sim.script import BLOCK_SIZE, Ask
from xllm_py.core.config import CacheConfig, EngineConfig
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.toy import EOS, ToyExecutor

_BLOCKS = 32
_EXECUTOR = ToyExecutor(
    EngineConfig(toy_num_blocks=_BLOCKS, cache=CacheConfig(block_size=BLOCK_SIZE))
)


def sampling_of(ask: Ask) -> SamplingParams:
    """Of its submission."""
    return SamplingParams(
        max_tokens=ask.max_tokens,
        seed=ask.seed,
        temperature=1.0 if ask.seed else 0.0,
        ignore_eos=ask.ignore_eos,
        stop_token_ids=ask.stop_token_ids,
        best_of=ask.best_of,
    )


def right_answer(ask: Ask, choice: int) -> tuple[list[int], str]:
    """Tokens and finish reason of one choice."""
    start = RowStart(
        row=0,
        request_id="oracle",
        block_ids=tuple(range(_BLOCKS)),
        sampling=dataclasses.replace(sampling_of(ask), best_of=1),
        choice=choice,
    )
    stops = {*ask.stop_token_ids, *(() if ask.ignore_eos else (EOS,))}
    known, computed = list(ask.prompt), 0
    for position in range(ask.max_tokens):
        fresh = known[computed:]
        plan = StepPlan(
            step=position,
            started=(start,) if not computed else (),
            rows=[0],
            num_tokens=[len(fresh)],
            num_computed=[computed],
            token_ids=fresh,
            sample=[1],
            positions=[position],
        )
        computed = len(known)
        known += _EXECUTOR.execute(plan).token_ids
        if known[-1] in stops:
            return known[len(ask.prompt) :], "stop"
    return known[len(ask.prompt) :], "length"
