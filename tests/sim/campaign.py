"""Many seeds by hand, and all of them to the end: prints one JSON line with how requests ended and every seed that went wrong.

    python -m tests.sim.campaign --count 100000 [--first 0] [--large]

--large: only seeds of larger clusters (three P, three D, two masters), about one in seven.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.sim.run import run, simulating
from tests.sim.script import EVERY_NAME, script_of

_SAY_EVERY = 1000


def seeds_of(first: int, *, large: bool) -> Iterator[int]:
    """From the first on, without end."""
    for seed in itertools.count(first):
        if not large or script_of(seed).names == EVERY_NAME:
            yield seed


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    ends: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    began, last = time.monotonic(), options.first
    with simulating():
        for number, seed in enumerate(
            itertools.islice(seeds_of(options.first, large=options.large), options.count), 1
        ):
            last = seed
            try:
                ends.update(run(seed).ends.values())
            except Exception as error:  # noqa: BLE001  the other seeds are to run all the same
                wrong[seed] = repr(error)
                print(f"seed {seed}: {error!r}", file=sys.stderr, flush=True)
            gc.collect()
            if number % _SAY_EVERY == 0:
                print(f"{number} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "schedules": options.count,
                "large": options.large,
                "last_seed": last,
                "ends": dict(ends),
                "wrong": wrong,
                "seconds": round(time.monotonic() - began),
            }
        )
    )


if __name__ == "__main__":
    main()
