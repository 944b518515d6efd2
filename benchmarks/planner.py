"""How many prefill and how many decode instances for this traffic and these limits? Also `scripts/plan`.

    xllm --model=FOLDER --devices=cpu:0 --cpu_threads=1 --profile_steps=steps.json
    scripts/plan --profile steps.json --dataset chat --rate 2 --goodput ttft:800 tpot:60 --instances 8 [--plot plan.png]

Each split of up to --instances instances, and as many colocated ones, are simulated with the profile's step times and the same seeded
arrivals (benchmarks/planner_sim); told are the share of requests within the limits at --rate, and the highest rate with 90 % within. One
JSON line per split; the answer is the smallest that keeps the rate, and of those with as many instances the one with the highest goodput.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.planner_sim import Costs, Plant, simulate
from benchmarks.report import emit
from benchmarks.service import Limits, attainment
from benchmarks.traffic import SHAPES, Asked, Drawn, at_rate, fixed, read_trace

REACHED = 0.9
_SPREAD = 1.02  # how near the highest rate is found


def traffic(options: argparse.Namespace, rate: float, seconds: float) -> list[Asked]:
    """Arrivals for so long at this rate."""
    count = max(30, round(rate * seconds))
    if options.trace_file:
        found = read_trace(options.trace_file)
        requests = [found[number % len(found)] for number in range(count)]
    else:
        lengths = (
            (fixed(options.input_len), fixed(options.output_len))
            if options.dataset == "random"
            else SHAPES[options.dataset]
        )
        source = Drawn(*lengths, seed=options.seed)
        requests = [source.request(number) for number in range(count)]
    return at_rate(requests, rate, seed=options.seed + 1)


def share_at(costs: Costs, plant: Plant, options: argparse.Namespace, rate: float) -> float:
    """Attainment at a rate."""
    return attainment(
        simulate(costs, plant, traffic(options, rate, options.seconds)), options.limits
    )


def goodput(costs: Costs, plant: Plant, options: argparse.Namespace) -> float:
    """The highest rate with enough requests within the limits; 0 when a lone request is not."""
    low, high = 0.0, 0.05
    while share_at(costs, plant, options, high) >= REACHED:
        low, high = high, 2 * high
    if low == 0.0:
        return 0.0
    while high / low > _SPREAD:
        middle = (low * high) ** 0.5
        if share_at(costs, plant, options, middle) >= REACHED:
            low = middle
        else:
            high = middle
    return low


def splits(most: int, base: Plant) -> dict[str, Plant]:
    """Every split into prefill and decode of up to `most` instances, and as many colocated ones."""
    found: dict[str, Plant] = {}
    for total in range(1, most + 1):
        found[f"{total} colocated"] = replace(base, prefills=0, decodes=0, colocated=total)
        for prefills in range(1, total):
            decodes = total - prefills
            found[f"{prefills}P+{decodes}D"] = replace(base, prefills=prefills, decodes=decodes)
    return found


def size(plant: Plant) -> int:
    """Instances."""
    return plant.colocated or plant.prefills + plant.decodes


def answer(rows: dict[str, dict[str, Any]], plants: dict[str, Plant], rate: float) -> str:
    """In words."""
    enough = [name for name, row in rows.items() if row["goodput_s"] >= rate]
    if not enough:
        most = max(rows, key=lambda name: rows[name]["goodput_s"])
        return (
            f"no split keeps {rate:g} requests/s within the limits; the best, {most}, keeps "
            f"{rows[most]['goodput_s']:g}. Allow more --instances, or wider limits"
        )
    best = min(enough, key=lambda name: (size(plants[name]), -rows[name]["goodput_s"]))
    return f"{best}: up to {rows[best]['goodput_s']:g} requests/s within the limits"


def draw(rows: dict[str, dict[str, Any]], rate: float, path: Path) -> None:
    """Goodput of every split."""
    plt, figure, axes = plots.canvas(width=max(6.4, 0.35 * len(rows)))
    heights = [row["goodput_s"] for row in rows.values()]
    colors = ["C1" if "colocated" in name else "C0" for name in rows]
    axes.bar(range(len(rows)), heights, color=colors)
    axes.axhline(rate, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), list(rows), rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("requests/s with 90 % within the limits")
    plots.save(plt, figure, path)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", type=Path, required=True, help="what xllm --profile_steps wrote")
    add("--dataset", choices=("random", *SHAPES), default="chat")
    add("--trace-file", type=Path, help="its requests, again and again, in place of a dataset")
    add("--input-len", type=int, default=128, help="tokens of a random prompt")
    add("--output-len", type=int, default=64, help="tokens of a random answer")
    add("--rate", type=float, required=True, help="requests per second")
    add("--goodput", nargs="+", required=True, metavar="LIMIT", help="ttft:MS tpot:MS e2e:MS")
    add("--instances", type=int, default=4, help="most of them")
    add("--chunk", type=int, default=10240, help="tokens of a prompt in one step")
    add("--max-seqs", type=int, default=1024, help="most sequences in one step")
    add("--link", type=float, default=1.0, help="GB/s from a prefill to a decode instance")
    add("--seconds", type=float, default=120.0, help="of simulated arrivals")
    add("--seed", type=int, default=0)
    add("--plot", type=Path)
    options = parser.parse_args(words)
    try:
        options.limits = Limits.read(options.goodput)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Simulate, tell, draw. Exit code 1 when no split is enough."""
    options = parse(words)
    costs = Costs.read(options.profile)
    base = Plant(
        0, 0, chunk=options.chunk, max_seqs=options.max_seqs, link_bytes_s=options.link * 1e9
    )
    plants = splits(options.instances, base)
    rows: dict[str, dict[str, Any]] = {}
    for name, plant in plants.items():
        rows[name] = {
            "instances": size(plant),
            "attainment": round(share_at(costs, plant, options, options.rate), 3),
            "goodput_s": float(f"{goodput(costs, plant, options):.3g}"),
        }
        emit("plan", {"split": name, "rate": options.rate}, rows[name])
    print(answer(rows, plants, options.rate), file=sys.stderr)
    if options.plot:
        draw(rows, options.rate, options.plot)
    return 0 if any(row["goodput_s"] >= options.rate for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
