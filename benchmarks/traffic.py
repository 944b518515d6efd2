"""What arrives, and when: seeded random prompts, named shapes of traffic, and traces from files. Knows neither servers nor times measured.

Shapes are log-normal lengths with the medians of the public sets they are named for, cut to what the model takes: `chat` (ShareGPT: short
questions, longer answers), `code` (HumanEval: short in, short out), `summary` (LongBench: long in, short out). Source of the idea: Zhong et al.
2024, DistServe, section 6.1.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

VOCABULARY = 256  # ids below it, which every model has
TRACE_BLOCK = 512  # tokens that one hash id of a Mooncake trace stands for
_CHARACTERS_A_TOKEN = 4  # of answers in a ShareGPT file, whose lengths are text


@dataclass(frozen=True)
class Asked:
    """One request."""

    at_s: float  # after the start of the load
    prompt: list[int] | str
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths with this median, `spread` the standard deviation of the logarithm, cut at both ends."""

    median: int
    spread: float
    least: int
    most: int

    def draw(self, chooser: random.Random) -> int:
        """One of them."""
        length = math.exp(math.log(self.median) + self.spread * chooser.gauss(0.0, 1.0))
        return min(max(round(length), self.least), self.most)


SHAPES: dict[str, tuple[Lengths, Lengths]] = {  # prompt, answer
    "chat": (Lengths(130, 0.9, 8, 1500), Lengths(90, 0.7, 8, 300)),
    "code": (Lengths(150, 0.4, 32, 600), Lengths(60, 0.5, 8, 200)),
    "summary": (Lengths(1400, 0.3, 600, 2600), Lengths(60, 0.4, 16, 160)),
}


@dataclass(frozen=True)
class Drawn:
    """Random token ids. Some prompts may begin alike: with one of `prefixes` beginnings of `prefix_tokens`."""

    prompt: Lengths
    answer: Lengths
    seed: int
    prefix_tokens: int = 0
    prefixes: int = 1

    def request(self, number: int) -> Asked:
        """The one with that number: the same for every server, and beyond the shared beginning no two alike."""
        chooser = random.Random(f"{self.seed} {number}")
        prompt_tokens, output_tokens = self.prompt.draw(chooser), self.answer.draw(chooser)
        shared: list[int] = []
        if self.prefix_tokens:
            which = chooser.randrange(self.prefixes)
            shared = ids_of(f"{self.seed} prefix {which}", self.prefix_tokens)
        own = [chooser.randrange(VOCABULARY) for _ in range(prompt_tokens)]
        return Asked(0.0, shared + own, output_tokens)


def fixed(tokens: int) -> Lengths:
    """Always this length."""
    return Lengths(tokens, 0.0, tokens, tokens)


def ids_of(name: str, count: int) -> list[int]:
    """Token ids that belong to a name."""
    chooser = random.Random(name)
    return [chooser.randrange(VOCABULARY) for _ in range(count)]


def at_rate(
    requests: Iterable[Asked], rate: float, *, seed: int, burstiness: float = 1.0
) -> list[Asked]:
    """Arrivals with gamma-distributed gaps of mean 1 / rate; burstiness 1: a Poisson process, less: burstier. rate inf: all at once."""
    chooser = random.Random(f"{seed} arrivals")
    at, placed = 0.0, []
    for request in requests:
        placed.append(replace(request, at_s=at))
        if math.isfinite(rate):
            at += chooser.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return placed


def read_trace(path: Path) -> list[Asked]:
    """JSON lines, or ShareGPT's list of conversations. Raises SystemExit with the line that is wrong.

    A line has `timestamp` (milliseconds; none: 0), the prompt as `prompt` (text), `prompt_token_ids`, or `input_length` with or without
    `hash_ids` (Mooncake: equal ids, equal blocks of 512 tokens), and `output_length`.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return [_of_conversation(each) for each in json.loads(text) if _has_two_turns(each)]
    return [_of_line(number, line, path) for number, line in _lines(text)]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def _of_line(number: int, line: str, path: Path) -> Asked:
    try:
        found = json.loads(line)
        at_s = float(found.get("timestamp", 0.0)) / 1e3
        return Asked(at_s, _prompt_of(found, number), int(found["output_length"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: line {number} is no request ({error!r})") from error


def _prompt_of(found: dict[str, Any], number: int) -> list[int] | str:
    if "prompt" in found:
        return str(found["prompt"])
    if "prompt_token_ids" in found:
        return [int(token) for token in found["prompt_token_ids"]]
    length = int(found["input_length"])
    blocks = [ids_of(f"block {block}", TRACE_BLOCK) for block in found.get("hash_ids", ())]
    ids = [token for block in blocks for token in block][:length]
    return ids + ids_of(f"line {number}", length - len(ids))


def _has_two_turns(found: dict[str, Any]) -> bool:
    return len(found.get("conversations", ())) >= 2


def _of_conversation(found: dict[str, Any]) -> Asked:
    question, answer = found["conversations"][:2]
    return Asked(0.0, question["value"], max(1, len(answer["value"]) // _CHARACTERS_A_TOKEN))
