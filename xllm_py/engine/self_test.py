"""The start-up proof that this machine's kernels keep their promise, and the numerics fingerprint of the card.

Eight fixed prompts are computed whole, and again in chunks followed by single tokens; a ninth stands behind a context of 509
tokens, which is not computed but read from one block again and again. Equal bits: the fingerprint is a hash of the eight's logits and
of what they depend on besides (`Device.variant`), and two instances with equal fingerprints continue each other's requests token for token. Different bits: the
fingerprint says `approximate`, and a warning says so.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from xllm_py.base import log
from xllm_py.base.hashing import APPROXIMATE
from xllm_py.core.plan import RowStart, StepPlan
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.worker import Worker

_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)
_FAR = 509  # a context from which the next tokens cross the cpu device's first window of 512 keys
_FAR_LENGTH = 11

_log = log.get(__name__)


def numerics_fingerprint(
    worker: Worker,
    vocab_size: int,
    max_len: int,
    num_blocks: int,
    block_size: int,
    variant: str = "",
) -> str:
    """Hex digest of the logits and the device's variant, or APPROXIMATE. Uses the first blocks of the cache before anybody owns them."""
    room = min(max_len - 1, num_blocks * block_size)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(variant.encode())
    for number, length in enumerate(_LENGTHS):
        if length > room:
            break
        ids = [(number * 7919 + i * 104729) % vocab_size for i in range(length)]
        logits = _equal(worker, ids, tuple(range(-(-length // block_size))), 0)
        if logits is None:
            return APPROXIMATE
        digest.update(logits.numpy().tobytes())
    ahead, end = _FAR // block_size, _FAR + _FAR_LENGTH
    own = (
        -(-end // block_size) - ahead
    )  # blocks that are written, behind those that are all block 0
    if end < max_len and own < num_blocks:
        ids = [i * 104729 % vocab_size for i in range(_FAR_LENGTH)]
        first = 1 if ahead else 0
        if _equal(worker, ids, (0,) * ahead + tuple(range(first, first + own)), _FAR) is None:
            return APPROXIMATE
    return digest.hexdigest()


def _equal(worker: Worker, ids: list[int], blocks: tuple[int, ...], context: int) -> Tensor | None:
    """The logits after the ids, or None and a warning when they depend on chunking."""
    whole = _run(worker, ids, [len(ids)], blocks, context)
    half = len(ids) // 2
    pieces = ([half] if half else []) + [1] * (len(ids) - half)
    if whole.equal(_run(worker, ids, pieces, blocks, context)):
        return whole
    _log.warning(
        "kernels depend on chunking; failover will be approximate", prompt=context + len(ids)
    )
    return None


def _run(
    worker: Worker, ids: list[int], pieces: list[int], blocks: tuple[int, ...], context: int
) -> Tensor:
    """Logits after the last token when the ids behind a context are computed in these pieces."""
    seen: list[Tensor] = []
    worker.observer = lambda _requests, _positions, logits: seen.append(logits)
    start = RowStart(
        row=0,
        request_id="self-test",
        block_ids=blocks,
        sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
    )
    computed = 0
    for step, count in enumerate(pieces):
        done = computed + count == len(ids)
        plan = StepPlan(
            step=step,
            started=(start,) if step == 0 else (),
            rows=[0],
            num_tokens=[count],
            num_computed=[context + computed],
            token_ids=ids[computed : computed + count],
            sample=[int(done)],
            positions=[0],
        )
        worker.execute(plan, None)
        computed += count
    worker.observer = None
    return seen[-1]
