"""What a decision of the cache-aware policy costs, and the index it looks into: benchmarks/routing says what it is worth.

    python -m benchmarks.routing_decision [--seed 0]

Microseconds from tokens to route: hashes of the prompt, the match, costs, choice; floors 150 at 100 instances, 1,000 at 1,000. Megabytes of an index
with a million blocks, each on two of 100 instances; floor 300.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc

from benchmarks.report import emit, summary
from benchmarks.routing import BLOCK, Decode, Prefill, Simulation, Speeds, traffic
from xllm_py.base.hashing import block_hashes, chain_root
from xllm_py.cluster.policies import Known, choose
from xllm_py.cluster.prefix_index import CacheNews, PrefixIndex
from xllm_py.cluster.routing import Facts


def decision_us(instances: int, seed: int) -> list[float]:
    """A decision each: hashes of the prompt, match, costs, choice; the index has what a busy cluster has."""
    rng = random.Random(seed)
    half = instances // 2
    simulation = Simulation(
        policy="CAR",
        prefills=[
            Prefill(f"p{n}", Speeds(prefill=0, token=0, step=0, row=0), 1) for n in range(half)
        ],
        decodes=[
            Decode(f"d{n}", Speeds(prefill=0, token=0, step=0, row=0), 1) for n in range(half)
        ],
        ttft_target_s=1.0,
        tpot_target_s=0.05,
    )
    asks = traffic(400, 1.0, seed)
    root = chain_root(key=b"k", model_fingerprint="m")
    prompts = {}
    for ask in asks:  # shared blocks become tokens that give shared hashes
        ids = [int.from_bytes(each[:2]) for each in ask.hashes for _ in range(BLOCK)]
        prompts[id(ask)], ask.hashes = ids, block_hashes(root, ids, BLOCK)
    names = list(simulation.costs)
    for ask in asks:
        for name in rng.sample(names, max(1, len(names) // 10)):
            number = simulation.numbers[name]
            news = CacheNews(since=number, upto=number + 1, added=b"".join(ask.hashes))
            simulation.numbers[name] = simulation.index.take(name, news)
    for costs in simulation.costs.values():
        costs.enqueue("x", rng.randrange(4000))
        costs.report(1, rng.randrange(30), 1000, 2000)
    took = []
    for ask in asks:
        began = time.perf_counter()
        hashes = block_hashes(root, prompts[id(ask)], BLOCK)
        held = {name: count * BLOCK for name, count in simulation.index.match(hashes).items()}
        known = Known(costs=simulation.costs, held=held)
        choose("CAR", simulation.found, Facts(num_prompt=ask.num_prompt, max_tokens=100), known)
        took.append(1e6 * (time.perf_counter() - began))
    return took


def index_megabytes(blocks: int) -> float:
    """Of so many blocks, each on two of 100 instances."""
    rng = random.Random(1)
    tracemalloc.start()
    index = PrefixIndex()
    number = dict.fromkeys(range(100), 1)
    for _ in range(0, blocks, 1000):
        added = rng.randbytes(16 * 1000)
        for name in rng.sample(range(100), 2):
            news = CacheNews(since=number[name], upto=number[name] + 1, added=added)
            number[name] = index.take(str(name), news)
    assert len(index) == blocks
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / 1e6


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for instances, floor in ((10, 150), (100, 150), (1000, 1000)):
        took = summary(decision_us(instances, options.seed))
        kept = took["median"] <= floor
        emit("decision", {"instances": instances}, {"us": took, "floor_us": floor, "kept": kept})
    used = round(index_megabytes(1_000_000), 1)
    emit("index of a million blocks", {}, {"megabytes": used, "kept": used <= 300})


if __name__ == "__main__":
    main()
