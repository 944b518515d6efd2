"""How near are the planner's predictions to what is measured?

    python -m benchmarks.planner_check --profile steps.json --measured result.json
    python -m benchmarks.planner_check --toy

The first takes what `benchmarks.pd_vs_colocated --save` measured, simulates the same arrivals over the same clusters with a profile of the same
machine (`xllm --profile_steps`, one thread on one core), and compares goodput at every pair of limits. The second starts two prefill and two
decode toy instances, whose steps take 20 ms and no core, behind a real master, profiles one of them, and compares at one pair of limits. One
JSON line per row: goodput predicted and measured, and predicted / measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.daemons import ROOT, daemons
from benchmarks.load import Target
from benchmarks.models import write_model
from benchmarks.pd_vs_colocated import RATES, SCALES, Seen, goodput_of, limits_of, run
from benchmarks.planner_sim import Costs, Plant, simulate
from benchmarks.report import emit
from benchmarks.service import Limits
from benchmarks.traffic import SHAPES, Asked, Drawn, Lengths, at_rate

PLANTS = {
    "pd": Plant(1, 1),
    "chunked": Plant(0, 0, colocated=2, chunk=256),
    "whole": Plant(0, 0, colocated=2),
}
Rows = dict[str, list[dict[str, Any]]]  # of each rate

TOY = "benchmarks.toy_instance"
TOY_STEP_S = 0.02
TOY_RATES = (4.0, 6.0, 8.0, 10.0, 12.0)
TOY_LOAD_S = 20.0
TOY_TRAFFIC = Drawn(Lengths(400, 0.5, 50, 1500), Lengths(40, 0.5, 8, 100), seed=3)
TOY_SEQS, TOY_TOKENS = 4, 64  # of one step
TOY_LIMITS = Limits(ttft_s=20 * TOY_STEP_S, tpot_s=1.6 * TOY_STEP_S)


def told(what: dict[str, Any], predicted: float, measured: float) -> None:
    """One row."""
    ratio = round(predicted / measured, 2) if measured else None
    figures = {"predicted": round(predicted, 3), "measured": round(measured, 3)}
    emit("plan_check", what, {**figures, "ratio": ratio})


def rows_of(costs: Costs, plant: Plant, asked: list[Asked]) -> list[dict[str, Any]]:
    """What clients of the simulated cluster would see."""
    return [asdict(Seen.of(answer, 0.0)) for answer in simulate(costs, plant, asked).answers]


def check_measured(profile: Path, measured: Path) -> None:
    """Every traffic, cluster and pair of limits of a file."""
    costs, found = Costs.read(profile), json.loads(measured.read_text())
    for traffic, clusters in found["answers"].items():
        for name, rates in clusters.items():
            predicted: Rows = {}
            for rate in RATES[traffic]:
                source = Drawn(*SHAPES[traffic], seed=3)
                count = len(rates[str(rate)])
                asked = at_rate([source.request(i) for i in range(count)], rate, seed=4)
                predicted[str(rate)] = rows_of(costs, PLANTS[name], asked)
            for scale in SCALES:
                limits = limits_of(found["solo"][traffic], scale)
                both = [goodput_of(each, limits)[0] for each in (predicted, rates)]
                told({"traffic": traffic, "cluster": name, "scale": scale}, *both)


def check_toy() -> None:
    """Two prefill and two decode instances."""
    flags = [f"--max_seqs_per_batch={TOY_SEQS}", f"--max_tokens_per_batch={TOY_TOKENS}"]
    flags += ["--enable_prefix_cache=false", "--block_size=16"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(folder / "tiny", "tiny")
        costs = toy_costs(folder, model, flags)
        measured: Rows = {}
        with daemons(folder, model) as started:
            target = Target("2P+2D", started.start_master().url, "tiny")
            for role in ("PREFILL", "PREFILL", "DECODE", "DECODE"):
                started.start_instance(role, flags, program=f"{TOY} {TOY_STEP_S}")
            for daemon in started.running:
                daemon.wait("/ready")
            for rate in TOY_RATES:
                load = run(target, toy_asked(rate))
                if load.failed:
                    raise SystemExit(f"{rate}/s: {load.failed[0]}")
                began = min(answer.sent_at for answer in load.answers)
                measured[str(rate)] = [asdict(Seen.of(each, began)) for each in load.answers]
    plant = Plant(2, 2, max_seqs=TOY_SEQS, max_tokens=TOY_TOKENS, chunk=TOY_TOKENS)
    predicted = {str(rate): rows_of(costs, plant, toy_asked(rate)) for rate in TOY_RATES}
    both = [goodput_of(each, TOY_LIMITS)[0] for each in (predicted, measured)]
    told({"traffic": "toy", "cluster": "2P+2D"}, *both)


def toy_asked(rate: float) -> list[Asked]:
    """The arrivals of one load."""
    count = round(rate * TOY_LOAD_S)
    return at_rate([TOY_TRAFFIC.request(number) for number in range(count)], rate, seed=4)


def toy_costs(folder: Path, model: Path, flags: list[str]) -> Costs:
    """Of one toy instance, by the same command as of a real one."""
    path = folder / "steps.json"
    command = [sys.executable, "-m", TOY, str(TOY_STEP_S), f"--model={model}", "--devices=cpu:0"]
    subprocess.run([*command, *flags, f"--profile_steps={path}"], cwd=ROOT, check=True)
    return Costs.read(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if not options.toy and not (options.profile and options.measured):
        parser.error("pass --profile and --measured, or --toy")
    if options.toy:
        check_toy()
    else:
        check_measured(options.profile, options.measured)


if __name__ == "__main__":
    main()
