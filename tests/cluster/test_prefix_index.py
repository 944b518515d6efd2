"""The index against sets: whatever is published, evicted, lost and told twice, a match is what the instances have."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_py.cluster import prefix_index
from xllm_py.cluster.prefix_index import NO_NEWS, CacheLog, CacheNews, PrefixIndex, split

NAMES = ("a", "b", "c")


def digest(number: int) -> bytes:
    return number.to_bytes(16)


class Cluster:
    """Instances with logs, one master, and news that may get lost on either way."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.logs = {name: CacheLog() for name in NAMES}
        self.has: dict[str, set[bytes]] = {name: set() for name in NAMES}
        self.wanted = dict.fromkeys(NAMES, 1)

    def note(self, name: str, added: list[int], removed: list[int]) -> None:
        gone = {digest(each) for each in removed}
        come = {digest(each) for each in added}
        self.logs[name].note(come, gone)
        self.has[name] = (self.has[name] - gone) | come

    def beat(self, name: str, *, heard: bool = True, answered: bool = True) -> None:
        news = self.logs[name].news(self.wanted[name])
        if heard:
            reply = self.index.take(name, news)
            if answered:
                self.wanted[name] = reply

    def reborn(self, name: str) -> None:
        self.index.forget(name)
        self.logs[name], self.has[name], self.wanted[name] = CacheLog(), set(), 1

    def expected(self, hashes: list[bytes]) -> dict[str, int]:
        found = {}
        for name, has in self.has.items():
            count = next((n for n, each in enumerate(hashes) if each not in has), len(hashes))
            if count:
                found[name] = count
        return found


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("note"),
            st.sampled_from(NAMES),
            st.lists(st.integers(0, 9), max_size=6),
            st.lists(st.integers(0, 9), max_size=6),
        ),
        st.tuples(st.just("beat"), st.sampled_from(NAMES), st.booleans(), st.booleans()),
        st.tuples(st.just("reborn"), st.sampled_from(NAMES), st.none(), st.none()),
    ),
    max_size=60,
)


@given(STEPS, st.lists(st.integers(0, 9), max_size=6), st.sampled_from((2, 5, 1000)))
@settings(max_examples=300)
def test_after_two_beats_that_arrive_the_index_knows_what_everybody_has(
    steps: list[tuple[str, str, object, object]], prompt: list[int], kept: int
) -> None:
    before, prefix_index._MOST_KEPT = prefix_index._MOST_KEPT, kept
    try:
        cluster = Cluster()
    finally:
        prefix_index._MOST_KEPT = before
    for kind, name, one, other in steps:
        if kind == "note":
            cluster.note(name, one, other)  # type: ignore[arg-type]
        elif kind == "beat":
            cluster.beat(name, heard=bool(one), answered=bool(other))
        else:
            cluster.reborn(name)
    for name in NAMES:
        cluster.beat(name)  # may only bring the wanted number
        cluster.beat(name)
    hashes = [digest(each) for each in prompt]
    assert cluster.index.match(hashes) == cluster.expected(hashes)
    everything = set().union(*cluster.has.values())
    assert len(cluster.index) == len(everything)
    assert {name: cluster.index.count(name) for name in NAMES} == {
        name: len(has) for name, has in cluster.has.items()
    }


def test_who_wants_nothing_is_told_nothing_and_who_has_all_hears_no_change() -> None:
    log = CacheLog()
    log.note([digest(1)], [])
    assert log.news(0) is NO_NEWS
    assert log.news(1) == CacheNews(since=1, upto=2, added=digest(1))
    assert log.news(2) == CacheNews(since=2, upto=2)


def test_a_log_that_does_not_reach_back_tells_everything() -> None:
    log = CacheLog()
    for number in range(prefix_index._MOST_KEPT + 10):
        log.note([digest(number)], [digest(number - 5)] if number >= 5 else [])
    news = log.news(1)
    assert news.reset
    assert len(split(news.added)) == 5
    assert log.news(news.upto) == CacheNews(since=news.upto, upto=news.upto)


def test_news_of_a_number_that_was_never_reached_are_a_reset() -> None:
    """The master outlived the instance's log: a new life of it under the old name."""
    log = CacheLog()
    log.note([digest(1)], [])
    assert log.news(1000).reset


def test_places_are_used_again() -> None:
    index = PrefixIndex()
    for life in range(50):
        index.take(f"life-{life}", CacheNews(since=1, upto=2, added=digest(1)))
        index.forget(f"life-{life}")
    index.take("last", CacheNews(since=1, upto=2, added=digest(1)))
    assert index._holders == {digest(1): 1}
