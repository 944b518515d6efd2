"""Whether there are blocks for one more prompt: now, and with --use_zero_evict for every answer that has begun, to its end.

Used by the batch (admission) and the scheduler (offers).
"""

from __future__ import annotations

from xllm_py.core.block_manager import BlockManager
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.open_requests import OpenRequests
from xllm_py.core.request import Request


class Headroom:
    """One engine's."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, open_requests: OpenRequests
    ) -> None:
        self._blocks = blocks
        self._open = open_requests
        self._usage_threshold = config.prefill_usage_threshold
        self._zero_evict = config.zero_evict

    def has_room(self, need: int, gain: int = 0) -> bool:
        """Whether a new prompt may take so many blocks: they are free, and some are left for those who decode.

        gain: blocks that could be freed for it.
        """
        free = min(self._blocks.num_free + gain, self._blocks.num_blocks)
        if need > free:
            return False
        total = self._blocks.num_blocks
        return free == total or total - free + need <= self._usage_threshold * total

    def admits(self, request: Request) -> bool:
        """As `fits_to_the_end`, for one that waits; one that is to be given away does not grow here."""
        choices = _open_choices(request)
        return request.to_give or self.fits_to_the_end(request.max_len, choices)

    def fits_to_the_end(self, max_len: int, num_choices: int) -> bool:
        """Whether all that hold blocks, and one more request of so many tokens and choices, can grow to their ends together.

        What they share is counted for each. Always true without --use_zero_evict, and for one that is alone, whose choices
        may give way to each other.
        """
        if not self._zero_evict:
            return True
        promised = sum(self._at_most(request) for request in self._open.holding())
        wanted = num_choices * self._blocks.blocks_for(max_len - 1)  # the last is never computed
        return not promised or promised + wanted <= self._blocks.num_blocks

    def _at_most(self, request: Request) -> int:
        if request.to_give:
            return len(request.block_ids)
        return _open_choices(request) * self._blocks.blocks_for(request.max_len - 1)


def _open_choices(request: Request) -> int:
    """Answers that will grow in its blocks: before the first token is known all of them, then its own."""
    return 1 if request.first_ids else request.submission.sampling.best_of
