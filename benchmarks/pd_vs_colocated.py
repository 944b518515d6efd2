"""Does splitting pay? One prefill and one decode instance against two colocated ones, on the same two cores, behind the same master.

    python -m benchmarks.pd_vs_colocated [--part gaps goodput overhead] [--shape 0.5b] [--plot-dir docs] [--save FILE] [--replot FILE]

Three clusters, each instance one thread on a core of its own, the same model and the same arrivals:
  pd          PREFILL + DECODE
  chunked     two DEFAULT instances, prompts in chunks of 256 tokens beside the running decodes
  whole       two DEFAULT instances, each prompt in one step

gaps: eight answers are being written; then prompts of 2,048 tokens arrive. The gaps between tokens before and while: p50, p99, mean of the
worst tenth. goodput: for each traffic shape and a few rates, the share of requests within limits of TTFT and TPOT that are multiples of what
one request alone needs (Zhong et al. 2024, DistServe, section 6.1); goodput is the highest rate with 90 % within. overhead: requests alone, one
by pd and one by whole in turn: what the handoff adds to TTFT and TPOT. One JSON line per row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import plots
from benchmarks.daemons import Daemon, daemons
from benchmarks.http_stream import Answer
from benchmarks.load import Target
from benchmarks.models import write_model
from benchmarks.open_loop import Load, run_open
from benchmarks.report import emit, percentile, summary
from benchmarks.service import Limits, attainment, milliseconds
from benchmarks.traffic import SHAPES, Asked, Drawn, at_rate, fixed

CACHE = "--max_cache_size=1073741824"
CLUSTERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "pd": (("PREFILL", ()), ("DECODE", ())),
    "chunked": (("DEFAULT", ("--max_tokens_per_chunk_for_prefill=256",)),) * 2,
    "whole": (("DEFAULT", ("--enable_chunked_prefill=false",)),) * 2,
}
RATES = {"chat": (0.4, 0.8, 1.2, 1.6), "code": (0.6, 1.2, 1.8, 2.4), "summary": (0.1, 0.2, 0.3)}
# limits as multiples of what a lone request needs: TTFT, TPOT
SCALES = tuple(itertools.product((2.0, 4.0, 8.0), (1.25, 1.5, 2.0, 3.0)))
TIGHT, LOOSE = (4.0, 1.5), (8.0, 3.0)
REACHED = 0.9
STREAMS, LONG, ANSWER = 8, 2048, 8
SHORT, SHORT_ANSWER = (16, 64, 256), 32  # tokens of requests alone
WARM_UP_S = 3.0


@dataclass(frozen=True)
class Seen:
    """One answer, as it is kept in a file."""

    ttft: float
    tpot: float
    e2e: float
    text_at: list[float]  # since the start of the load

    @staticmethod
    def of(answer: Answer, began: float) -> Seen:
        """From what came."""
        at = [each - began for each in answer.text_at]
        return Seen(answer.ttft, answer.tpot, answer.e2e, at)


@contextlib.contextmanager
def cluster(name: str, shape: str) -> Iterator[Target]:
    """Its instances are ready and warm; instance i runs on core i, the master where there is room."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(folder / shape, shape)
        with daemons(folder, model) as started:
            master = started.start_master()
            for core, (role, flags) in enumerate(CLUSTERS[name]):
                common = ["--load_format=dummy", CACHE, "--cpu_threads=1"]
                # every prompt is computed: what is compared is scheduling, not caching
                common += ["--enable_prefix_cache=false", *flags]
                started.start_instance(role, common, core=core, member=True)
            for daemon in started.running:
                daemon.wait("/ready")
            target = Target(name, master.url, shape)
            warm(target, master)
            yield target


def warm(target: Target, master: Daemon) -> None:
    """Both instances compute once whatever they will compute."""
    source = Drawn(fixed(300), fixed(8), seed=-1)
    load = run(target, [source.request(number) for number in range(4)])
    if load.failed:
        raise SystemExit(f"warm-up of {target.name}: {load.failed[0]}; see {master.log_file}")


def run(target: Target, asked: Sequence[Asked]) -> Load:
    """One load."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_open(target, asked))


# ---- gaps ----


def long_prompts(options: argparse.Namespace) -> list[Asked]:
    """Long prompts with short answers, so many seconds apart, after the calm half."""
    source = Drawn(fixed(LONG), fixed(ANSWER), seed=2)
    return [
        Asked(options.calm_s + index * options.every_s, source.request(index).prompt, ANSWER)
        for index in range(int(options.storm_s / options.every_s))
    ]


def gaps_of(target: Target, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds between tokens of the running answers, before the first long prompt and while they come."""
    source = Drawn(fixed(128), fixed(options.stream_tokens), seed=1)
    streams = [source.request(number) for number in range(STREAMS)]
    load = run(target, [*streams, *long_prompts(options)])
    if load.failed:
        raise SystemExit(f"{target.name}: {load.failed[0]}")
    answers = load.answers[:STREAMS]
    began = min(answer.sent_at for answer in answers)
    storm = began + options.calm_s
    end = storm + options.storm_s
    found: dict[str, list[float]] = {"calm": [], "storm": []}
    for answer in answers:
        for early, late in itertools.pairwise(answer.text_at):
            # the first seconds are the streams' own prompts
            if began + WARM_UP_S < late < storm:
                found["calm"].append(late - early)
            elif storm < late < end:
                found["storm"].append(late - early)
    return found


def worst_tenth(samples: Sequence[float]) -> float:
    """Mean of the longest tenth."""
    return statistics.fmean(sorted(samples)[-max(1, len(samples) // 10) :])


def measure_gaps(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """One row per cluster; several rounds together."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in CLUSTERS:
        with cluster(name, options.shape) as target:
            rounds = [gaps_of(target, options) for _ in range(options.rounds)]
        both = {part: [gap for each in rounds for gap in each[part]] for part in ("calm", "storm")}
        found[name] = both
        p99 = [percentile(each["storm"], 0.99) / percentile(each["calm"], 0.99) for each in rounds]
        results = {
            part: {
                **milliseconds(samples),
                "worst_tenth": float(f"{1e3 * worst_tenth(samples):.4g}"),
                "max": float(f"{1e3 * max(samples):.4g}"),
                "gaps": len(samples),
            }
            for part, samples in both.items()
        }
        ratio = {"p99_storm_over_calm": [float(f"{each:.3g}") for each in p99]}
        settings = {"cluster": name, "shape": options.shape, "streams": STREAMS, "long": LONG}
        emit("pd_gaps", {**settings, "every_s": options.every_s}, {**results, **ratio})
    return found


# ---- overhead ----


def measure_overhead(options: argparse.Namespace) -> None:
    """One row per length of prompt."""
    with cluster("pd", options.shape) as pd, cluster("whole", options.shape) as whole:
        for tokens in SHORT:
            source = Drawn(fixed(tokens), fixed(SHORT_ANSWER), seed=7)
            found: dict[str, list[Answer]] = {"pd": [], "whole": []}
            for number in range(options.rounds * 10):
                for target in (pd, whole):
                    found[target.name] += run(target, [source.request(number)]).good
            ttft = [each.ttft - other.ttft for each, other in zip(*found.values(), strict=True)]
            tpot = [each.tpot / other.tpot for each, other in zip(*found.values(), strict=True)]
            rows = {
                name: {"ttft_ms": milliseconds([each.ttft for each in answers])["p50"]}
                for name, answers in found.items()
            }
            results = {"ttft_added_ms": milliseconds(ttft), "tpot_ratio": summary(tpot)}
            emit("pd_overhead", {"shape": options.shape, "prompt": tokens}, {**rows, **results})


# ---- goodput ----

Answers = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]  # traffic, cluster, rate


def measure_goodput(options: argparse.Namespace) -> tuple[dict[str, Any], Answers]:
    """What a lone request needs, by traffic; and every answer of every load."""
    solo: dict[str, Any] = {}
    answers: Answers = {traffic: {} for traffic in options.traffic}
    for name in CLUSTERS:
        with cluster(name, options.shape) as target:
            for traffic in options.traffic:
                if (
                    name == "whole"
                ):  # colocated, undisturbed: the same in all clusters but for PD's handoff
                    solo[traffic] = alone(target, traffic)
                rates = answers[traffic][name] = {}
                for rate in RATES[traffic]:
                    rates[str(rate)] = loaded(target, traffic, rate, options.load_s)
                    print(f"{name} {traffic} {rate}: done", flush=True)
    return solo, answers


def alone(target: Target, traffic: str) -> dict[str, float]:
    """TTFT and TPOT of requests that come one after the other; medians."""
    source = Drawn(*SHAPES[traffic], seed=5)
    good = [run(target, [source.request(number)]).good[0] for number in range(7)]
    return {
        "ttft": statistics.median(answer.ttft for answer in good),
        "tpot": statistics.median(answer.tpot for answer in good),
    }


def loaded(target: Target, traffic: str, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Poisson arrivals for so long."""
    source = Drawn(*SHAPES[traffic], seed=3)
    count = max(6, round(rate * seconds))
    asked = at_rate([source.request(number) for number in range(count)], rate, seed=4)
    load = run(target, asked)
    if load.failed:
        raise SystemExit(f"{target.name}, {traffic}, {rate}/s: {load.failed[0]}")
    began = min(answer.sent_at for answer in load.answers)
    return [asdict(Seen.of(answer, began)) for answer in load.answers]


def share_of(rows: Sequence[dict[str, Any]], limits: Limits) -> float:
    """Attainment of answers from a file."""
    answers = [
        Answer(0.0, each["e2e"], [each["ttft"], each["ttft"] + each["tpot"]], 2, True, "")
        for each in rows
    ]
    return attainment(Load([], answers, 1.0), limits)


def goodput_of(
    rates: dict[str, list[dict[str, Any]]], limits: Limits
) -> tuple[float, list[tuple[float, float]]]:
    """The highest rate with enough answers within the limits, between two measured ones by a straight line; and the curve."""
    curve = [(float(rate), share_of(rows, limits)) for rate, rows in rates.items()]
    best = 0.0
    for (low, share), (high, less) in itertools.pairwise([(0.0, 1.0), *curve]):
        if share < REACHED:
            break
        best = high if less >= REACHED else low + (high - low) * (share - REACHED) / (share - less)
    return best, curve


def tell_goodput(solo: dict[str, Any], answers: Answers, shape: str) -> None:
    """One row per traffic and pair of limits."""
    for traffic, clusters in answers.items():
        for scale in SCALES:
            limits = limits_of(solo[traffic], scale)
            best = {
                name: round(goodput_of(rates, limits)[0], 3) for name, rates in clusters.items()
            }
            most = max(best["chunked"], best["whole"])
            row = {
                "ttft_ms": round(1e3 * limits.ttft_s),
                "tpot_ms": round(1e3 * limits.tpot_s, 1),
                "goodput_s": best,
                "pd_over_best_colocated": round(best["pd"] / most, 2) if most else None,
            }
            emit("pd_goodput", {"traffic": traffic, "shape": shape, "scale": scale}, row)


def limits_of(solo: dict[str, float], scale: tuple[float, float]) -> Limits:
    """Multiples of what a lone request needs."""
    return Limits(ttft_s=scale[0] * solo["ttft"], tpot_s=scale[1] * solo["tpot"])


# ---- plots ----


def draw(found: dict[str, Any], folder: Path) -> None:
    """docs/why-split.md shows these."""
    if found.get("gaps"):
        plt, figure, (left, right) = plots.canvas(2)
        for name, parts in found["gaps"].items():
            plots.cdf(left, parts["calm"], name, tail=True)
            plots.cdf(right, parts["storm"], name, tail=True)
        for axes, title in (
            (left, "nothing else arrives"),
            (right, f"{LONG}-token prompts arrive"),
        ):
            axes.set_xscale("log")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("gap between two tokens, ms")
            axes.set_ylabel("share of gaps that are longer")
            axes.grid(alpha=0.3)
        left.legend(fontsize=8)
        plots.save(plt, figure, folder / "why-split-gaps.png")
    if found.get("answers"):
        traffics = list(found["answers"])
        plt, figure, grid = plots.canvas(len(traffics), width=4.2, height=3.4)
        for axes, traffic in zip(grid, traffics, strict=True):
            for name, rates in found["answers"][traffic].items():
                for scale, style in ((TIGHT, "o-"), (LOOSE, "x:")):
                    _, curve = goodput_of(rates, limits_of(found["solo"][traffic], scale))
                    color = f"C{list(CLUSTERS).index(name)}"
                    label = f"{name}, TPOT x{scale[1]:g}"
                    axes.plot(*zip(*curve, strict=True), style, color=color, label=label)
            axes.axhline(REACHED, color="grey", linewidth=0.8, linestyle="--")
            axes.set_ylim(0, 1.05)
            axes.set_title(traffic, fontsize=9)
            axes.set_xlabel("requests per second")
            axes.grid(alpha=0.3)
        grid[0].set_ylabel("share within the limits")
        grid[0].legend(fontsize=7)
        plots.save(plt, figure, folder / "why-split-goodput.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=("gaps", "goodput", "overhead"), default=["gaps", "goodput"])
    add("--shape", default="0.5b")
    add("--rounds", type=int, default=3, help="of gaps; tens of overhead")
    add("--stream-tokens", type=int, default=500, help="of each running answer")
    add("--calm-s", type=float, default=8.0)
    add("--storm-s", type=float, default=15.0)
    add("--every-s", type=float, default=5.0, help="between long prompts")
    add("--traffic", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    add("--load-s", type=float, default=30.0, help="of arrivals at each rate")
    add("--plot-dir", type=Path)
    add("--save", type=Path)
    add("--replot", type=Path, help="measure nothing: tell and draw what was saved")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.replot.read_text()) if options.replot else {}
    if not options.replot:
        if "gaps" in options.part:
            found["gaps"] = measure_gaps(options)
        if "overhead" in options.part:
            measure_overhead(options)
        if "goodput" in options.part:
            found["solo"], found["answers"] = measure_goodput(options)
    if options.save:
        options.save.write_text(json.dumps(found))
    if found.get("answers"):
        tell_goodput(found["solo"], found["answers"], options.shape)
    if options.plot_dir:
        draw(found, options.plot_dir)


if __name__ == "__main__":
    main()
