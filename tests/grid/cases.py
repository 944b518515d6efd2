"""The rows of the grid: every feature of a request alone and in pairs, greedy and seeded, on several prompts.

A case is written as a client writes it, as a body. Some bodies depend on what the model says to the same body without them
(a stop string has to occur in the text): `Case.body` makes them from a first answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

MAX_TOKENS = 12
NUM_PROMPTS = 8
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "seed": 1},
    "seeded": {"temperature": 0.9, "seed": 77},
    "cut": {"temperature": 1.4, "seed": -5, "top_k": 60, "top_p": 0.95, "min_p": 0.001},
}
# what a feature adds to the body; those of FROM_ANSWER follow when the first answer is known
FEATURES: dict[str, dict[str, Any]] = {
    "n": {"n": 3},
    "best_of": {"n": 2, "best_of": 4},
    "logprobs": {"logprobs": 3},
    "penalties": {
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.3,
    },
    "bias": {"logit_bias": {"40": 4.0, "41": 3.5, "150": -100.0}},
    "echo": {"echo": True},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "array", "items": {"enum": [1, 22, 303]}}},
        }
    },
    "stop string": {},
    "stop id": {},
    "min_tokens": {},
}
FROM_ANSWER = frozenset({"stop string", "stop id", "min_tokens"})
SEVERAL = frozenset({"n", "best_of"})
# more of these than two at once
CROWDS: tuple[tuple[str, ...], ...] = (
    ("best_of", "logprobs", "penalties", "bias"),
    ("n", "logprobs", "echo", "prompt_logprobs"),
    ("logprobs", "penalties", "bias", "stop string", "min_tokens"),
    ("n", "penalties", "stop id", "min_tokens"),
    ("logprobs", "echo", "stop id", "bias"),
    ("best_of", "logprobs", "penalties", "schema", "min_tokens"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What the model says to a case before stops are put into it: of the first choice shown."""

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    features: tuple[str, ...]
    sampling: str
    prompt: tuple[int, ...]

    @property
    def group(self) -> str:
        """Features, as a test is named."""
        return "+".join(self.features) or "plain"

    @property
    def has_several(self) -> bool:
        """Whether D needs its prefix cache for it."""
        return not SEVERAL.isdisjoint(self.features)

    @property
    def num_candidates(self) -> int:
        """Answers to its prompt, shown or not."""
        return 4 if "best_of" in self.features else 3 if "n" in self.features else 1

    @property
    def scores_prompt(self) -> bool:
        """Whether all of the prompt has to be computed, cached or not."""
        return "prompt_logprobs" in self.features or {"echo", "logprobs"} <= set(self.features)

    @property
    def asks_first(self) -> bool:
        """Whether its body depends on a first answer."""
        return not FROM_ANSWER.isdisjoint(self.features)

    def body(self, said: Said | None = None) -> dict[str, Any]:
        """A body of /v1/completions; without `said` the one to ask first."""
        body: dict[str, Any] = {
            "prompt": list(self.prompt),
            "max_tokens": MAX_TOKENS,
            **SAMPLINGS[self.sampling],
        }
        for feature in self.features:
            body |= FEATURES[feature]
        if said is not None and self.asks_first:
            body |= self._stops(said)
        return body

    def _stops(self, said: Said) -> dict[str, Any]:
        found: dict[str, Any] = {}
        has_id, has_min = "stop id" in self.features, "min_tokens" in self.features
        if "stop string" in self.features:
            found |= {"stop": [_inner(said.text)]}
            found |= {"include_stop_str_in_output": len(self.prompt) % 2 == 0}
        if has_id or has_min:
            # with min_tokens a token that would end the answer before its time, else one in its middle
            at = 1 if has_min else len(said.tokens) // 2
            found |= {"stop_token_ids": [said.tokens[at]]}
        if has_id and has_min:
            found["stop_token_ids"].append(said.tokens[-2])
        if has_min:
            found |= {"min_tokens": 5}
        return found


def _inner(text: str) -> str:
    """One or two whole characters from the middle of a text."""
    at = [index for index in range(2, len(text)) if text[index] != "�"]
    if not at:
        return "never said"
    middle = at[len(at) // 2]
    return text[middle : middle + 2].rstrip("�")


def prompts(num_ids: int) -> list[tuple[int, ...]]:
    """Longer than a chunk of 16, so that several blocks can be shared; none begins like another."""
    chooser = random.Random(11)
    return [
        (index, *(chooser.randrange(num_ids) for _ in range(17 + 3 * index)))
        for index in range(NUM_PROMPTS)
    ]


def cases(num_ids: int, without: frozenset[str] = frozenset()) -> list[Case]:
    """All rows of the grid, in a fixed order that mixes them. without: features that the executor does not have."""
    features = [each for each in FEATURES if each not in without]
    pairs = itertools.combinations(features, 2)
    wishes: list[tuple[str, ...]] = [(), *((one,) for one in features)]
    wishes += [pair for pair in pairs if not SEVERAL.issuperset(pair)]
    wishes += [crowd for crowd in CROWDS if without.isdisjoint(crowd)]
    known = prompts(num_ids)
    found = [
        Case(features, sampling, known[(3 * number + turn) % NUM_PROMPTS])
        for number, features in enumerate(wishes)
        for sampling in SAMPLINGS
        for turn in (0, 3)
    ]
    random.Random(5).shuffle(found)
    return found
