"""Puts a load on any OpenAI-compatible server and tells what its clients see. Also `scripts/bench`.

    python -m benchmarks.serve --url http://127.0.0.1:8888 --request-rate 4 --num-prompts 200
    python -m benchmarks.serve --url ... --dataset chat --request-rate 1 2 4 8 --goodput ttft:500 tpot:60 --plot-dir plots
    python -m benchmarks.serve --url ... --dataset trace --trace-file mooncake.jsonl --save-result result.json

Open loop: requests arrive when their time has come, whatever became of those before. Several rates are measured one after the other. ttft:
to the first text; tpot: (last text - first text) / (tokens - 1); itl: between two events with text; e2e: to the end of the stream. Goodput
counts requests within the limits of --goodput. One JSON line per rate, and a table on stderr. Exit code 1 when a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import plots
from benchmarks.load import Target
from benchmarks.open_loop import Api, Load, run_open
from benchmarks.report import emit
from benchmarks.service import Limits, attainment, figures_of
from benchmarks.traffic import SHAPES, Asked, Drawn, at_rate, fixed, read_trace


def first_model(url: str) -> str:
    """The name the server gives first."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def drawn(options: argparse.Namespace) -> Drawn:
    """The workload of `random` and of the named shapes."""
    if options.dataset == "random":
        prompt, answer = fixed(options.input_len), fixed(options.output_len)
    else:
        prompt, answer = SHAPES[options.dataset]
    return Drawn(prompt, answer, options.seed, options.prefix_len, options.num_prefixes)


def requests_of(options: argparse.Namespace, rate: float) -> list[Asked]:
    """What arrives at this rate. A trace that has times keeps them, unless a rate is given."""
    if options.dataset == "trace":
        found = read_trace(options.trace_file)[: options.num_prompts]
        if rate == 0.0:
            return found
        return at_rate(found, rate, seed=options.seed, burstiness=options.burstiness)
    source = drawn(options)
    requests = [source.request(number) for number in range(options.num_prompts)]
    return at_rate(requests, rate or math.inf, seed=options.seed, burstiness=options.burstiness)


def warm_up(target: Target, options: argparse.Namespace, api: Api) -> None:
    """Requests that do not count, all at once, with prompts of their own."""
    source = fixed(options.input_len), fixed(min(8, options.output_len))
    drawn = Drawn(*source, seed=-1 - options.seed)
    asked = [drawn.request(number) for number in range(options.warm_up)]
    load = asyncio.run(run_open(target, asked, api=api))
    if load.failed:
        raise SystemExit(f"warm-up: {load.failed[0]}")


def measure(
    target: Target, options: argparse.Namespace, api: Api, limits: Limits
) -> dict[float, Load]:
    """One load per rate."""
    loads: dict[float, Load] = {}
    for rate in options.request_rate:
        asked = requests_of(options, rate)
        run = run_open(
            target, asked, api=api, at_once=options.max_concurrency, progress=not options.quiet
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            load = loads[rate] = runner.run(run)
        figures = figures_of(load, limits)
        settings = {"dataset": options.dataset, "rate": rate if math.isfinite(rate) else "inf"}
        emit("serve", {**settings, "seed": options.seed}, figures)
        table(figures, load)
    return loads


def table(figures: dict[str, Any], load: Load) -> None:
    """For people."""
    lines = [f"  {'':10}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}"]
    for name in ("ttft", "tpot", "itl", "e2e"):
        row = figures.get(f"{name}_ms", {})
        lines.append(f"  {name + ', ms':10}" + "".join(f"{value:10.1f}" for value in row.values()))
    lines.append(
        f"  {figures['requests_s']} requests/s, {figures['tokens_s']} tokens/s, {figures['goodput_s']} requests/s within the limits "
        f"({100 * figures['attainment']:.0f} %), {figures['failed']} of {figures['requests']} failed"
    )
    lines += [f"  failed: {cause[:200]}" for cause in sorted(set(load.failed))[:3]]
    print("\n".join(lines), file=sys.stderr)


def draw(loads: dict[float, Load], limits: Limits, folder: Path) -> None:
    """All plots of the loads."""
    folder.mkdir(parents=True, exist_ok=True)
    good = {f"{rate:g} requests/s": load.good for rate, load in loads.items() if load.good}
    if not good:
        return
    plots.latency_cdfs(good, folder / "latency.png")
    plots.timeline(
        max(next(iter(good.values())), key=lambda it: it.num_tokens), folder / "timeline.png"
    )
    points = [(rate, attainment(load, limits)) for rate, load in loads.items()]
    if len(points) > 1:
        plots.goodput({"this server": points}, folder / "goodput.png", "attainment against rate")


def save(loads: dict[float, Load], limits: Limits, path: Path) -> None:
    """Figures and every answer's times, as one JSON file."""
    rows = []
    for rate, load in loads.items():
        answers = [
            {
                "arrived_s": asked.at_s,
                "prompt_tokens": len(asked.prompt),
                "output_tokens": answer.num_tokens,
                "text_s": [round(at - answer.sent_at, 6) for at in answer.text_at],
                "e2e_s": round(answer.e2e, 6),
                "error": answer.error,
            }
            for asked, answer in zip(load.asked, load.answers, strict=True)
        ]
        rows.append({"rate": rate, "figures": figures_of(load, limits), "answers": answers})
    path.write_text(json.dumps(rows))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="the server, as http://HOST:PORT")
    add("--model", help="without, the first it names")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields of every body")
    add("--dataset", choices=("random", *SHAPES, "trace"), default="random")
    add("--trace-file", type=Path, help="JSON lines (Mooncake's too) or ShareGPT's list")
    add("--input-len", type=int, default=128, help="tokens of a random prompt")
    add("--output-len", type=int, default=64, help="tokens of a random answer")
    add("--prefix-len", type=int, default=0, help="tokens at the beginning that prompts share")
    add("--num-prefixes", type=int, default=1, help="of such beginnings")
    add("--num-prompts", type=int, default=100)
    add(
        "--request-rate",
        type=float,
        nargs="+",
        default=[0.0],
        help="requests per second; 0: a trace's own times, else all at once",
    )
    add("--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier")
    add("--max-concurrency", type=int, default=0, help="most open requests; 0: no limit")
    add("--goodput", nargs="+", default=[], metavar="LIMIT", help="ttft:MS tpot:MS e2e:MS")
    add("--warm-up", type=int, default=4, help="requests that do not count")
    add("--seed", type=int, default=0)
    add("--save-result", type=Path, metavar="FILE")
    add("--plot-dir", type=Path, metavar="FOLDER")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(words)
    if (options.dataset == "trace") != (options.trace_file is not None):
        parser.error("--dataset trace and --trace-file go together")
    try:
        options.limits = Limits.read(options.goodput)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, save, draw."""
    options = parse(words)
    target = Target("url", options.url, options.model or first_model(options.url))
    api = Api(options.endpoint == "chat", tuple(options.extra_body.items()))
    if options.warm_up:
        warm_up(target, options, api)
    loads = measure(target, options, api, options.limits)
    if options.save_result:
        save(loads, options.limits, options.save_result)
    if options.plot_dir:
        draw(loads, options.limits, options.plot_dir)
    return 1 if any(load.failed for load in loads.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
