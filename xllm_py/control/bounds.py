"""Checks of counts and lengths that a peer's message must pass before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from xllm_py.base.errors import ProtocolViolation

MAX_IDS = 1 << 20  # tokens of one request
MAX_ENTRIES = 1 << 16  # of one message
MAX_OFFERS = 4096
MAX_SUBMISSIONS = 256
MAX_LABEL = 512  # characters of an id, a name or an address
MAX_TEXT = 4096
MAX_GRAMMAR = 256 * 1024
MAX_TOP = 2000  # most likely tokens told beside one
MAX_CARD_BYTES = 64 * 1024
MAX_MOMENTS = 16

Value = TypeVar("Value")


def check(good: bool, what: str) -> None:
    """Raise ProtocolViolation naming `what` unless `good`."""
    if not good:
        raise ProtocolViolation(f"control message refused: {what}")


def label(text: str) -> str:
    """An id, a name or an address."""
    check(len(text) <= MAX_LABEL, "a name is too long")
    return text


def labels(texts: Sequence[str]) -> list[str]:
    """A column of them."""
    check(len(texts) <= MAX_ENTRIES, "too many entries")
    return [label(text) for text in texts]


def column(values: Sequence[Value], length: int, what: str) -> list[Value]:
    """A column that must be as long as its neighbours."""
    check(len(values) == length, f"column {what} has {len(values)} entries of {length}")
    return list(values)


def sparse(values: Mapping[int, Value], length: int, what: str) -> dict[int, Value]:
    """A column that has values for some entries only."""
    check(len(values) <= length, f"column {what} is too long")
    check(all(entry < length for entry in values), f"column {what} names an unknown entry")
    return dict(values)
