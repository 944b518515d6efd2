"""What happens in one simulation: everything that a seed decides, drawn before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from tests.sim.grpc_memory import Weather
from xllm_py.engine.toy import VOCAB_SIZE

BLOCK_SIZE = 4
PREFILLS = ("p1", "p2")
DECODES = ("d1", "d2")
NAMES = (*PREFILLS, *DECODES)
OVERLAPS_FROM = (
    1 << 40
)  # seeds from here on overlap, so that those before tell the stories they told
MORE = ("p3", "d3")  # of larger clusters
EVERY_NAME = (*NAMES, *MORE)
_LOSING = frozenset({"kill", "cut", "stall", "drain"})  # may cost a request an attempt
MASTERS = ("master", "master2")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One client: when it comes, what it asks, and when it leaves (None: it waits for the end)."""

    name: str
    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int  # 0: greedy
    best_of: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    timeout_s: float
    leaves_after_s: float | None
    salt: str
    priority: int = 0
    offline: bool = False
    poison_at: int | None = None  # a step that computes this token of it raises


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something befalls the cluster. other: the second of two; lasts_s: an outage, a stall, or the time to rebirth."""

    at: float
    kind: str
    who: str
    other: str = ""
    lasts_s: float = 0.0


@dataclass(kw_only=True)
class Script:
    """One seed's story."""

    seed: int
    relay: bool
    prefix: frozenset[str]  # instances with a prefix cache
    num_blocks: dict[str, int]
    max_seqs: int
    chunked: bool
    tokens_per_batch: int
    tokens_per_chunk: int
    threshold: float
    local_decode: bool
    strategy: str = "fcfs"
    pull: bool = False  # D fetches, else P pushes
    overlap: bool = False  # engines begin a step before the one before it is taken in
    policy: str = "RR"
    num_masters: int = 1
    names: tuple[str, ...] = NAMES
    asks: list[Ask]
    events: list[Event] = field(default_factory=list)
    weather: Weather = field(default_factory=Weather)
    kv_fault: str = ""
    kv_fault_share: float = 0.0

    @property
    def unkind(self) -> bool:
        """Whether so much goes wrong by chance that three attempts in a row may be lost; a death, a cut or a stall loses one."""
        weather = self.weather  # a call may last 1 s there and back
        losses = weather.lost or weather.unanswered or (weather.slow and weather.slow_s > 0.5)
        many = sum(event.kind in _LOSING for event in self.events) > 2
        return bool(losses) or many or self.kv_fault not in ("", "late")


def script_of(seed: int) -> Script:
    """Draw."""
    random = Random(seed)
    caching = random.random()
    script = Script(
        seed=seed,
        relay=random.random() < 0.25,
        prefix=frozenset(
            name for name in NAMES if caching < 0.4 or (caching < 0.7 and random.random() < 0.5)
        ),
        num_blocks={},
        max_seqs=random.choice((2, 3, 4, 8)),
        chunked=random.random() < 0.8,
        tokens_per_batch=random.choice((24, 32, 64)),
        tokens_per_chunk=random.choice((4, 7, 16, 64)),
        threshold=random.choice((0.8, 0.95, 1.0)),
        local_decode=random.random() < 0.6,
        asks=[],
    )
    mood = Mood(
        prefixes=[_tokens(random, random.randint(4, 14)) for _ in range(2)],
        crowded=random.random() < 0.4,
        hasty=random.random() < 0.2,
        leaving=random.random() < 0.35,
    )
    numbers = (2, 3, 4, 5, 6) if mood.crowded else (1, 2, 2, 3, 4)
    script.asks += [_ask(random, n, mood, script) for n in range(random.choice(numbers))]
    largest = max(-(-(len(ask.prompt) + ask.max_tokens) // BLOCK_SIZE) for ask in script.asks)
    for name in NAMES:
        more = random.randint(0, 3) if mood.crowded else random.randint(3, 25)
        script.num_blocks[name] = largest + more
    if random.random() < 0.6:
        _trouble(random, script)
    # from a source of its own: the rest of a seed's story is what it was without these
    random = Random(f"{seed} kinds of clients")
    if random.random() < 0.3:
        _classes(random, script)
    if random.random() < 0.15:
        _flushes(random, script)
    if random.random() < 0.1:
        _poison(random, script)
    script.overlap = seed >= OVERLAPS_FROM
    script.pull = Random(f"{seed} transfer").random() < 0.3
    script.policy = Random(f"{seed} policy").choice(("RR", "LOAD", "CAR", "CAR", "SLO_AWARE"))
    _masters(Random(f"{seed} masters"), script)
    _size(Random(f"{seed} size"), script)
    return script


def _size(random: Random, script: Script) -> None:
    """Three of each and two masters in some, and then there is more to lose."""
    if random.random() >= 0.15:
        return
    script.names, script.num_masters = EVERY_NAME, 2
    for name in MORE:
        script.num_blocks[name] = script.num_blocks[name.replace("3", "1")]
        if script.prefix.issuperset(DECODES):
            script.prefix = script.prefix | {name}
    for _ in range(random.choice((0, 1, 1, 2))):
        kind = random.choice(("kill", "kill", "stall", "drain"))
        at, lasts_s = random.uniform(0, 0.15), random.choice((0.1, 0.8, 3.0))
        who = random.choice(EVERY_NAME if kind == "kill" else MORE)
        script.events.append(Event(at=at, kind=kind, who=who, lasts_s=lasts_s))


def _masters(random: Random, script: Script) -> None:
    """A second one in some, which may die."""
    if random.random() < 0.25:
        script.num_masters = 2
        if random.random() < 0.4:
            at = random.uniform(0, 0.15)
            script.events.append(Event(at=at, kind="kill master", who="master2"))


def _classes(random: Random, script: Script) -> None:
    """Priorities, and some that may wait."""
    script.strategy = random.choice(("fcfs", "priority", "deadline"))
    script.asks = [
        replace(ask, priority=random.randrange(4), offline=random.random() < 0.5)
        for ask in script.asks
    ]


def _flushes(random: Random, script: Script) -> None:
    for _ in range(random.choice((1, 3))):
        at = random.uniform(0, 0.15)
        script.events.append(Event(at=at, kind="flush", who=random.choice(NAMES)))


def _poison(random: Random, script: Script) -> None:
    """The model cannot compute one of them: in its prompt, or later."""
    number = random.randrange(len(script.asks))
    ask = script.asks[number]
    script.asks[number] = replace(ask, poison_at=random.randrange(len(ask.prompt) + 6))


@dataclass(frozen=True, kw_only=True)
class Mood:
    """What the clients of one seed have in common."""

    prefixes: list[tuple[int, ...]]
    crowded: bool  # they come together, and the caches are small
    hasty: bool
    leaving: bool


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE - 1) for _ in range(count))


def _ask(random: Random, number: int, mood: Mood, script: Script) -> Ask:
    prompt = (*random.choice((*mood.prefixes, ())), *_tokens(random, random.randint(1, 9)))
    if random.random() < 0.15:
        prompt = mood.prefixes[0]
    hasty = mood.hasty and random.random() < 0.5
    leaving = mood.leaving and random.random() < 0.5
    return Ask(
        name=f"r{number}",
        at=random.uniform(0, 0.01 if mood.crowded else 0.15),
        prompt=prompt,
        max_tokens=random.choice((1, 5, 8, 12, 16) if mood.crowded else (1, 2, 5, 8, 12)),
        seed=random.choice((0, random.randrange(1, 1 << 40))),
        best_of=_best_of(random, script),
        ignore_eos=random.random() < 0.5,
        stop_token_ids=_tokens(random, random.choice((0, 0, 0, 20, 60))),
        timeout_s=random.uniform(0.005, 0.3) if hasty else 30.0,
        leaves_after_s=random.uniform(0, 0.15) if leaving else None,
        salt=random.choice(("", "", "", "other")),
    )


def _best_of(random: Random, script: Script) -> int:
    """Drawn always, so that a request with it is otherwise the same as without."""
    wanted = random.choice((1, 1, 1, 1, 2, 3, 4))
    able = script.prefix.issuperset(DECODES) or random.random() < 0.1
    return wanted if able and wanted <= script.max_seqs else 1


def _trouble(random: Random, script: Script) -> None:
    """One kind or two."""
    kinds = (_kill, _cut, _kv_fault, _bad_weather, _stall, _kv_cut, _drain)
    for kind in random.sample(kinds, random.choice((1, 1, 2))):
        kind(random, script)


def _pair(random: Random) -> tuple[str, str]:
    return random.choice(PREFILLS), random.choice(DECODES)


def _kill(random: Random, script: Script) -> None:
    at = random.uniform(0, 0.15)
    reborn_s = random.choice((0.02, 0.2, 0.8))
    script.events.append(Event(at=at, kind="kill", who=random.choice(NAMES), lasts_s=reborn_s))


def _cut(random: Random, script: Script) -> None:
    who, other = random.choice((_pair(random), ("master", random.choice(NAMES))))
    lasts_s = random.choice((0.0, 0.03, 0.3, 1.5))
    at = random.uniform(0, 0.15)
    script.events.append(Event(at=at, kind="cut", who=who, other=other, lasts_s=lasts_s))


def _kv_cut(random: Random, script: Script) -> None:
    for _ in range(random.choice((1, 3))):
        who, other = _pair(random)
        script.events.append(Event(at=random.uniform(0, 0.1), kind="kv cut", who=who, other=other))


def _kv_fault(random: Random, script: Script) -> None:
    script.kv_fault = random.choice(("late", "cut", "lost", "flipped", "mute"))
    script.kv_fault_share = random.choice((0.3, 1.0)) if script.kv_fault == "late" else 0.5


def _bad_weather(random: Random, script: Script) -> None:
    script.weather = random.choice(
        (
            Weather(slow=0.3),
            Weather(slow=0.1, slow_s=0.6),
            Weather(lost=0.08),
            Weather(unanswered=0.08),
            Weather(slow=0.2, lost=0.04, unanswered=0.04),
        )
    )


def _stall(random: Random, script: Script) -> None:
    lasts_s = random.choice((0.1, 1.0, 3.0))
    who = random.choice(NAMES)
    script.events.append(Event(at=random.uniform(0, 0.1), kind="stall", who=who, lasts_s=lasts_s))


def _drain(random: Random, script: Script) -> None:
    script.events.append(Event(at=random.uniform(0, 0.1), kind="drain", who=random.choice(NAMES)))
