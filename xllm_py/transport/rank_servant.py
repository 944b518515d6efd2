"""The KV transport of a rank that plans nothing: a thread that does what rank 0 says over transport/rank_line, and tells what happened.

Started by engine/ranks beside the steps, of which it hears what is stored.
"""

from __future__ import annotations

import select
import threading

from xllm_py.base import log
from xllm_py.base.errors import InternalError, PeerUnavailable, ProtocolViolation
from xllm_py.core.kv_memory import KvMemory
from xllm_py.transport import rank_line
from xllm_py.transport.base import KvTransport
from xllm_py.transport.pipe import BlockingPipe

STORED_S = 60.0  # rank 0 has stored that layer already; a rank that is so late is stuck

_log = log.get(__name__)


class Progress:
    """How far this rank's steps are. Told by its engine thread, waited for by the servant's."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._step = self._layers = 0

    def begin(self) -> None:
        """The next step; its numbers are those of rank 0's plans."""
        with self._state:
            self._step, self._layers = self._step + 1, 0

    def stored(self, layer: int) -> None:
        """A LayerDone of core.executor."""
        with self._state:
            self._layers = layer + 1
            self._state.notify_all()

    def wait(self, step: int, layer: int) -> None:
        """Until this layer of this step is stored here. Raises InternalError when it never is."""
        with self._state:
            there = self._state.wait_for(
                lambda: (self._step, self._layers) > (step, layer), STORED_S
            )
        if not there:
            raise InternalError(f"layer {layer} of step {step} is not stored in {STORED_S:g} s")


class RankServant:
    """See the module's text. It owns the transport from `start` on."""

    def __init__(
        self, *, line: BlockingPipe, transport: KvTransport, memory: KvMemory, progress: Progress
    ) -> None:
        self._line = line
        self._transport = transport
        self._memory = memory
        self._progress = progress
        self._thread = threading.Thread(target=self._run, name="kv-servant", daemon=True)

    def start(self, rank: int, endpoint: str) -> None:
        """Say where we are reached, and obey."""
        self._line.send(rank_line.Joined(rank=rank, endpoint=endpoint))
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which rank 0's end of the line brings."""
        self._thread.join(rank_line.ANSWER_S)

    def _run(self) -> None:
        try:
            while True:
                ready = select.select([self._line.fileno(), self._transport.wake_fd], [], [])[0]
                events = self._transport.poll()
                if events:
                    self._line.send(rank_line.Happened(events=events))
                if self._line.fileno() in ready:
                    for order in self._line.receive():
                        self._obey(order)
        except PeerUnavailable as gone:
            _log.debug("KV line ended", reason=gone.message)
        except (InternalError, ProtocolViolation) as error:
            _log.error("KV line broke", reason=error.message)
        finally:
            self._line.close()  # rank 0 hears of it, whatever it was
            self._transport.close()

    def _obey(self, order: rank_line.Order) -> None:
        transport = self._transport
        match order:
            case rank_line.Push(grant=grant, layer=layer, first=first, block_ids=block_ids):
                self._progress.wait(order.step, layer)
                transport.push(grant, layer, first, block_ids)
            case rank_line.Open(grant=given):
                transport.open_grant(given)
            case rank_line.Connect(grant=given):
                transport.connect(given)
            case rank_line.Commit(grant=grant):
                transport.commit(grant)
            case rank_line.Revoke(grant=grant):
                transport.revoke(grant)
            case rank_line.Probe(probe=probe, num_bytes=num_bytes, fetch=fetch):
                transport.probe(probe, num_bytes, fetch=fetch)
            case rank_line.Ask(call=call, abandon=abandon, poison=poison):
                for grant in abandon:
                    transport.abandon(grant)
                if poison:
                    self._memory.poison(poison)
                self._line.send(rank_line.Done(call=call, counts=transport.ledger()))
