"""Which instance has which prefix in its KV cache: the instance's log of changes, the news that travel, the master's index.

    instance   CacheLog    every block that is published or evicted gets a number; news are what came after a number
    master     PrefixIndex block hash -> set of instances, as bits of one integer; a match walks the prompt's hashes once for all of them

News come with heartbeats and may be lost or come twice: they say from which number on they are, and who has not that number asks again
(the reply of a heartbeat names the number that is wanted). An instance whose log does not reach back tells everything it has
(reset). Both know the hashes from tokens by the same function, base/hashing. A stale entry costs a wrong guess,
never a wrong token: the instance looks into its own cache. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xllm_py.base.hashing import HASH_BYTES

MOST_TOLD = 1 << 16  # hashes in one message, a mebibyte; what does not fit into a reset is not told
_MOST_KEPT = 1 << 15  # changes that a log reaches back


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNews:
    """Changes from number `since` up to `upto`; hashes of 16 bytes, joined. reset: everything before is forgotten first."""

    since: int = 0
    upto: int = 0
    reset: bool = False
    added: bytes = b""
    removed: bytes = b""


NO_NEWS = CacheNews()


def split(joined: bytes) -> list[bytes]:
    """The hashes."""
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


class CacheLog:
    """What one engine has published, and the last changes. Numbers begin at 1; who asks from 0 on wants nothing."""

    def __init__(self) -> None:
        self._present: dict[bytes, None] = {}
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=_MOST_KEPT)
        self._next = 1

    def note(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Blocks were published or evicted."""
        for digest in removed:
            if digest in self._present:
                del self._present[digest]
                self._put(digest, False)
        for digest in added:
            if digest not in self._present:
                self._present[digest] = None
                self._put(digest, True)

    def _put(self, digest: bytes, added: bool) -> None:
        self._changes.append((digest, added))
        self._next += 1

    def news(self, since: int) -> CacheNews:
        """For somebody who has everything before number `since`."""
        if not since:
            return NO_NEWS
        count = self._next - since
        if count < 0 or count > len(self._changes):
            told = list(self._present)[-MOST_TOLD:]
            return CacheNews(since=since, upto=self._next, reset=True, added=b"".join(told))
        if not count:
            return CacheNews(since=since, upto=since)
        count = min(count, MOST_TOLD)
        first = len(self._changes) - (self._next - since)
        changes = dict(self._changes[at] for at in range(first, first + count))
        return CacheNews(
            since=since,
            upto=since + count,
            added=b"".join(digest for digest, added in changes.items() if added),
            removed=b"".join(digest for digest, added in changes.items() if not added),
        )


class PrefixIndex:
    """Of all instances of one master."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._places: dict[str, int] = {}  # incarnation -> its bit
        self._free_places: list[int] = []
        self._counts: dict[str, int] = {}  # incarnation -> its blocks
        self._wanted: dict[str, int] = {}  # incarnation -> the number that it is to tell from

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, incarnation: str, news: CacheNews) -> int:
        """Put news in; returns the number from which on more is wanted."""
        wanted = self._wanted.get(incarnation, 1)
        if news.upto == 0 or (news.since != wanted and not news.reset):
            return wanted  # lost or repeated: it is told from there again
        if news.reset:
            self.forget(incarnation)
        bit = 1 << self._place(incarnation)
        holders, count = self._holders, self._counts.get(incarnation, 0)
        for digest in split(news.added):
            known = holders.get(digest, 0)
            count += not known & bit
            holders[digest] = known | bit
        for digest in split(news.removed):
            count -= self._take_away(digest, bit)
        self._wanted[incarnation], self._counts[incarnation] = news.upto, count
        return news.upto

    def _place(self, incarnation: str) -> int:
        place = self._places.get(incarnation)
        if place is None:
            place = self._free_places.pop() if self._free_places else len(self._places)
            self._places[incarnation] = place
        return place

    def _take_away(self, digest: bytes, bit: int) -> bool:
        """Whether it was there."""
        known = self._holders.get(digest, 0)
        if not known & bit:
            return False
        if known == bit:
            del self._holders[digest]
        else:
            self._holders[digest] = known ^ bit
        return True

    def count(self, incarnation: str) -> int:
        """How many blocks an instance has, as far as is known."""
        return self._counts.get(incarnation, 0)

    def forget(self, incarnation: str) -> None:
        """That life is over."""
        self._wanted.pop(incarnation, None)
        self._counts.pop(incarnation, None)
        place = self._places.pop(incarnation, None)
        if place is None:
            return
        bit = 1 << place
        for digest in [digest for digest, holders in self._holders.items() if holders & bit]:
            self._take_away(digest, bit)
        self._free_places.append(place)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """For each instance that has any of the leading blocks, how many."""
        alive, found = -1, dict[int, int]()
        for count, digest in enumerate(hashes):
            holders = self._holders.get(digest, 0) & alive
            ended = alive & ~holders if count else 0
            if ended:
                _spread(ended, count, found)
            alive = holders
            if not alive:
                break
        else:
            count = len(hashes)
        if alive > 0:
            _spread(alive, count, found)
        if not found:
            return {}
        return {name: found[place] for name, place in self._places.items() if place in found}


def _spread(bits: int, count: int, found: dict[int, int]) -> None:
    """Note the count for every bit."""
    while bits:
        lowest = bits & -bits
        found[lowest.bit_length() - 1] = count
        bits ^= lowest
