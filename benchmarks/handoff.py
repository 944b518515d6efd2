"""How much of a handoff's transfer nothing hides: P and D of the 0.5B shape, prompts of 2,048 tokens, links of 1 and 10 Gbit/s and unthrottled.

Both engines in one process, KV over real TCP through a proxy process that keeps the rate. With overlap the layers leave as they are
computed, without it all leave after the prompt. `exposed` is what lies between COMMIT and D's word that all is there; its share is
of the time from the request to its second token. One JSON line per row; with --plot a bar chart (extra `plots`).

    python -m benchmarks.handoff [--prompt 2048] [--rounds 3] [--threads 2] [--plot docs/handoff.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import select
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.models import write_model
from benchmarks.report import emit, summary
from xllm_py.base.clock import RealClock
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.request import Receiver, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.engine.ranks import open_executor
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.wire import messages as m

KEY = b"benchmark key of some length 32."
RATES = {"1 Gbit/s": 125e6, "10 Gbit/s": 1250e6, "unthrottled": float("inf")}
FLOOR = 0.03
DEADLINE_S = 300.0
_PIECE = 1 << 17
CLOCK = RealClock()


def proxy(target: tuple[str, int], rate: float, told: Connection) -> None:
    """A process that passes every connection on, giver to taker no faster than `rate` bytes a second."""
    server = socket.create_server(("127.0.0.1", 0))
    told.send(server.getsockname()[1])
    giver, _ = server.accept()
    taker = socket.create_connection(target)
    due, buffer = time.perf_counter(), memoryview(bytearray(_PIECE))
    while True:
        for sock in select.select([giver, taker], [], [])[0]:
            count = sock.recv_into(buffer)
            if not count:
                return
            if sock is taker:
                giver.sendall(buffer[:count])
                continue
            now = time.perf_counter()
            due = max(due, now) + count / rate
            time.sleep(max(0.0, due - now))
            taker.sendall(buffer[:count])


class Side:
    """One engine without its process."""

    def __init__(self, model: Path, name: str, threads: int, overlap: bool) -> None:
        config = EngineConfig(
            model_path=str(model),
            load_format="dummy",
            cpu_threads=threads,
            cache=CacheConfig(max_cache_bytes=128 << 20, enable_prefix_cache=False),
            scheduler=SchedulerConfig(max_seqs_per_batch=2),
        )
        self.executor = open_executor(config)
        capacity, memory = self.executor.capacity(), self.executor.kv_memory()
        self.scheduler = Scheduler(
            config.scheduler, capacity.facts, capacity.num_blocks, capacity.block_size
        )
        self.transport = TcpKvTransport(memory=memory, incarnation=name, cluster_key=KEY)
        self.events: list[m.Event] = []
        self.agent = HandoffAgent(
            scheduler=self.scheduler,
            transport=self.transport,
            config=config.scheduler,
            model_fingerprint="same",
            layout=memory.layout,
            send=self.events.append,
        )
        self._overlap = overlap
        self.between_layers: Callable[[], object] = lambda: None
        self.said: list[tuple[float, int]] = []  # when which position came

    def turn(self) -> bool:
        """One round of the engine loop; whether anything was computed."""
        agent, now = self.agent, CLOCK.now()
        agent.on_news(now)
        plan = self.scheduler.schedule(now)
        agent.before_step(plan, now)
        if not plan.empty:
            if self._overlap:
                result = self.executor.execute(plan, self._layer_done)
            else:
                agent.giving.on_crash()  # nothing is claimed: it is pushed after the step
                result = self.executor.execute(plan)
            self.scheduler.apply(plan, result, CLOCK.now())
        agent.after_step(CLOCK.now())
        outputs = self.scheduler.take_outputs()
        self.said += [(CLOCK.now(), position) for position in outputs.positions]
        return not plan.empty

    def _layer_done(self, layer: int) -> None:
        self.agent.layer_done(layer)
        self.between_layers()  # the real loop looks for answers to offers here


def carry(giver: Side, taker: Side, endpoint: str) -> list[m.Verdicts]:
    """What the two API processes do; D's KV port is the proxy's. Returns verdicts."""
    now, verdicts = CLOCK.now(), []
    for event in giver.events:
        if isinstance(event, m.OffersOut):
            offers = [dataclasses.replace(each, giver_incarnation="p") for each in event.offers]
            taker.agent.taking.on_offers(m.Offers(offers=offers), now)
        elif isinstance(event, m.FirstTokensOut):
            taker.agent.taking.on_first_tokens(m.FirstTokens(firsts=event.firsts), now)
        elif isinstance(event, m.Verdicts):
            verdicts.append(event)
    giver.events.clear()
    for event in taker.events:
        if isinstance(event, m.Answers):
            told = [dataclasses.replace(each, endpoints=(endpoint,)) for each in event.answers]
            giver.agent.giving.on_answers(m.Answers(answers=told), now)
        elif isinstance(event, m.FirstTaken):
            giver.agent.giving.on_first_taken(event, now)
    taker.events.clear()
    return verdicts


def run(giver: Side, taker: Side, endpoint: str, number: int, length: int) -> dict[str, float]:
    """One request: seconds to its first and second token, and of its transfer."""
    giver.said.clear()
    taker.said.clear()
    began = CLOCK.now()
    submission = Submission(
        request_id=f"r{number}",
        prompt_ids=tuple((7 * number + 13 * i) % 1000 for i in range(length)),
        sampling=SamplingParams(max_tokens=3, temperature=0.0, seed=1, ignore_eos=True),
        receiver=Receiver(name="d", address="d", incarnation="d"),
    )
    giver.scheduler.add(submission, began)
    verdicts: list[m.Verdicts] = []
    giver.between_layers = lambda: verdicts.extend(carry(giver, taker, endpoint))
    while len(taker.said) < 2 or not verdicts:
        if CLOCK.now() - began > DEADLINE_S:
            raise SystemExit("a handoff did not end")
        busy = giver.turn()
        verdicts += carry(giver, taker, endpoint)
        busy = taker.turn() or busy
        verdicts += carry(giver, taker, endpoint)
        if not busy:
            select.select([giver.transport.wake_fd, taker.transport.wake_fd], [], [], 0.005)
    if verdicts[0].kinds != ["landed"]:
        raise SystemExit(f"the handoff ended with {verdicts[0]}")
    return {
        "first": giver.said[0][0] - began,
        "second": taker.said[0][0] - began,
        "transfer": verdicts[0].seconds[0],
        "exposed": verdicts[0].exposed[0],
        "bytes": verdicts[0].num_bytes[0],
    }


def measure(model: Path, rate: str, overlap: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    giver = Side(model, "p", options.threads, overlap)
    taker = Side(model, "d", options.threads, overlap=True)
    host, _, port = taker.transport.endpoint.rpartition(":")
    ours, theirs = multiprocessing.Pipe()
    between = multiprocessing.Process(target=proxy, args=((host, int(port)), RATES[rate], theirs))
    between.start()
    try:
        endpoint = f"127.0.0.1:{ours.recv()}"
        run(giver, taker, endpoint, 0, options.prompt)
        rounds = [
            run(giver, taker, endpoint, n, options.prompt) for n in range(1, options.rounds + 1)
        ]
    finally:
        giver.transport.close()
        taker.transport.close()
        between.terminate()
        between.join()
    shares = [each["exposed"] / each["second"] for each in rounds]
    results = {
        "first_token_s": summary([each["first"] for each in rounds]),
        "second_token_s": summary([each["second"] for each in rounds]),
        "transfer_s": summary([each["transfer"] for each in rounds]),
        "exposed_s": summary([each["exposed"] for each in rounds]),
        "exposed_share": round(statistics.median(shares), 4),
        "megabytes": round(rounds[0]["bytes"] / 1e6, 1),
    }
    emit("handoff", {"link": rate, "overlap": overlap, "prompt": options.prompt}, results)
    return {"link": rate, "overlap": overlap, **results}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Exposed seconds by link, with overlap and without."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    links = list(RATES)
    for offset, overlap in ((-0.2, False), (0.2, True)):
        heights = [
            1000 * row["exposed_s"]["median"]
            for link in links
            for row in rows
            if (row["link"], row["overlap"]) == (link, overlap)
        ]
        label = "layers leave as they are computed" if overlap else "all layers leave at the end"
        bars = axes.bar([i + offset for i in range(len(links))], heights, 0.38, label=label)
        axes.bar_label(bars, fmt="%.0f ms", fontsize=8)
    axes.set_xticks(range(len(links)), links)
    axes.set_yscale("log")
    axes.set_ylabel("exposed transfer, ms (log)")
    axes.set_title("Handoff of a 2,048-token prompt, Qwen2-0.5B shape")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.shape)
        rows = [
            measure(model, rate, overlap, options) for rate in RATES for overlap in (False, True)
        ]
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
