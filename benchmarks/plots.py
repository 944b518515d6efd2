"""The pictures of a load: CDFs of TTFT and TPOT, goodput against rate, the timeline of one request. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.http_stream import Answer


def canvas(columns: int = 1, width: float = 6.4, height: float = 3.6) -> tuple[Any, Any, Any]:
    """(pyplot, figure, axes), drawn without a screen. Raises SystemExit that says what to install."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install -e '.[plots]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")
    return plt, figure, axes


def save(plt: Any, figure: Any, path: Path) -> None:
    """Write it; the ending says how (png, svg)."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cdf(axes: Any, samples: Sequence[float], label: str, *, tail: bool = False) -> None:
    """The share of samples up to each value, milliseconds. tail: the share beyond it, on a logarithmic scale."""
    ordered = sorted(1e3 * each for each in samples)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    if tail:
        axes.step(ordered, [max(1 - share, 1e-6) for share in shares], where="post", label=label)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 / len(ordered))
    else:
        axes.step(ordered, shares, where="post", label=label)
        axes.set_ylim(0, 1)


def latency_cdfs(loads: Mapping[str, Sequence[Answer]], path: Path) -> None:
    """TTFT and TPOT side by side, a line for each load."""
    plt, figure, (left, right) = canvas(2)
    for name, answers in loads.items():
        cdf(left, [answer.ttft for answer in answers], name)
        cdf(right, [answer.tpot for answer in answers], name)
    for axes, what in ((left, "time to first token, ms"), (right, "time per output token, ms")):
        axes.set_xscale("log")
        axes.set_xlabel(what)
        axes.set_ylabel("share of requests")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(plt, figure, path)


def goodput(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str) -> None:
    """Attainment (0 to 1) against requests per second, a line for each server."""
    plt, figure, axes = canvas()
    for name, points in lines.items():
        axes.plot([rate for rate, _ in points], [share for _, share in points], "o-", label=name)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("share within the limits")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(plt, figure, path)


def timeline(answer: Answer, path: Path) -> None:
    """Tokens of one request against time, and the gaps between them."""
    plt, figure, (left, right) = canvas(2)
    times = [1e3 * (at - answer.sent_at) for at in answer.text_at]
    left.step([0.0, *times], range(len(times) + 1), where="post")
    left.set_xlabel("ms since it was sent")
    left.set_ylabel("events with text")
    right.plot(range(2, len(times) + 1), [1e3 * gap for gap in answer.gaps], ".-")
    right.set_xlabel("event")
    right.set_ylabel("ms since the one before")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(plt, figure, path)
