"""The start-up proof that this machine's kernels keep their promise, and the numerics fingerprint of the card.

Eight fixed prompts are computed whole, and again in chunks followed by single tokens. Equal bits: the fingerprint is a hash of
the logits, and two instances with equal fingerprints continue each other's requests token for token. Different bits: the
fingerprint says `approximate`, and a warning says so.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from xllm_py.base import log
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.engine.worker import Worker

APPROXIMATE = "approximate"
_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)

_log = log.get(__name__)


def numerics_fingerprint(
    worker: Worker, vocab_size: int, max_len: int, num_blocks: int, block_size: int
) -> str:
    """Hex digest of the logits, or APPROXIMATE. Uses the first blocks of the cache before anybody owns them."""
    room = min(max_len - 1, num_blocks * block_size)
    digest = hashlib.blake2b(digest_size=16)
    for number, length in enumerate(_LENGTHS):
        if length > room:
            break
        ids = [(number * 7919 + i * 104729) % vocab_size for i in range(length)]
        whole = _run(worker, ids, [length], block_size)
        half = length // 2
        pieces = ([half] if half else []) + [1] * (length - half)
        if not whole.equal(_run(worker, ids, pieces, block_size)):
            _log.warning("kernels depend on chunking; failover will be approximate", prompt=length)
            return APPROXIMATE
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def _run(worker: Worker, ids: list[int], pieces: list[int], block_size: int) -> Tensor:
    """Logits after the last token when the prompt is computed in these pieces."""
    seen: list[Tensor] = []
    worker.observer = lambda _requests, _positions, logits: seen.append(logits)
    start = RowStart(
        row=0,
        request_id="self-test",
        block_ids=tuple(range(-(-len(ids) // block_size))),
        temperature=0.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        seed=0,
    )
    computed = 0
    for step, count in enumerate(pieces):
        done = computed + count == len(ids)
        plan = StepPlan(
            step=step,
            started=(start,) if step == 0 else (),
            rows=[0],
            num_tokens=[count],
            num_computed=[computed],
            token_ids=ids[computed : computed + count],
            sample=[done],
            positions=[0],
        )
        worker.execute(plan, None)
        computed += count
    worker.observer = None
    return seen[-1]
