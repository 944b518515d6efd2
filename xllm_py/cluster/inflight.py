"""The token log of every open request: the only source of what clients see.

Every entry an instance reports is judged against the log by (request, attempt, incarnation, choice, position):

    position = next   appended, together with entries held before that follow it
    behind            must equal the log, else the attempt is ended as diverged
    ahead             held; when nobody else may still bring what lies between, it is asked for again
    old attempt, foreign incarnation    dropped, counted

P and D report over connections of their own, so D's second token may come before P's first; that is why `ahead` is held. A
finish is taken once. Readers take from the log what they have not read yet. Pure; owned by master/generations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from xllm_py.base.logprob import TokenLogprob

GOOD_FINISHES = frozenset({"stop", "length"})
MAX_HELD = 4096  # entries of one choice that may wait for a gap before them


class Judgement(Enum):
    """What became of an entry."""

    APPENDED = "appended"
    REPEATED = "repeated"
    HELD = "held"  # waits for what another instance reports
    GAP = "gap"  # waits; to be sent again from `next`
    ENDED = "ended"  # it ended the request with an error
    DIVERGED = "diverged"
    STALE = "stale"  # unknown request, old attempt or foreign incarnation


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement and the next position of that choice. closed: the choice has its finish, nothing more is needed."""

    judgement: Judgement
    next: int = 0
    closed: bool = False


_STALE = Judged(Judgement.STALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of an instance's report. token_id -1: it only ends the request."""

    attempt: int
    incarnation: str
    choice: int
    position: int
    token_id: int
    finish_reason: str = ""
    message: str = ""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a reader has not seen of one choice: tokens from `position` on; finish_reason "" while it goes on."""

    choice: int
    position: int
    token_ids: tuple[int, ...]
    finish_reason: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, when the request asked for them
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with the first news of choice 0


@dataclass(slots=True)
class ChoiceLog:
    """One answer."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # as long as ids, or empty
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_read: int = 0
    finish_reason: str = ""
    finish_read: bool = False
    held: dict[int, Entry] = field(default_factory=dict)

    @property
    def has_news(self) -> bool:
        """Whether something was not read yet."""
        finished = bool(self.finish_reason) and not self.finish_read
        return finished or self.num_read < len(self.ids)

    def is_closed(self) -> bool:
        """Whether it has its finish."""
        return bool(self.finish_reason)

    def append(self, entry: Entry) -> set[str]:
        """The entry of the next position, and those held that follow it. Returns whose entries these were."""
        self._append_one(entry)
        speakers = {entry.incarnation}
        while not self.finish_reason and len(self.ids) in self.held:
            following = self.held.pop(len(self.ids))
            self._append_one(following)
            speakers.add(following.incarnation)
        if self.finish_reason:
            self.held.clear()
        return speakers

    def _append_one(self, entry: Entry) -> None:
        if entry.token_id >= 0:
            self.ids.append(entry.token_id)
            if entry.logprob is not None:
                self.logprobs.append(entry.logprob)
            self.prompt_logprobs = self.prompt_logprobs or entry.prompt_logprobs
        self.finish_reason = entry.finish_reason


@dataclass(slots=True, kw_only=True)
class RequestLog:
    """One open request. needed: incarnations without which the attempt cannot end well."""

    request_id: str
    attempt: int
    first: str  # incarnation of the instance the request was submitted to
    decode: str = ""  # of the one that takes it over, empty: none
    max_tokens: int
    needed: set[str]
    choices: list[ChoiceLog]
    landed: bool = False  # the giver said that the taker has it
    error: tuple[str, str] | None = None  # code and message
    spoke: set[str] = field(
        default_factory=set
    )  # incarnations whose tokens it took, of this attempt
    at_fault: frozenset[str] = frozenset()  # incarnations, when it has an error
    died: bool = False  # they are gone, and not by their own will

    @property
    def done(self) -> bool:
        """Every choice has finished, or the request failed."""
        return self.error is not None or all(choice.is_closed() for choice in self.choices)

    @property
    def computing(self) -> str:
        """The incarnation that works on it, as far as is known here."""
        return self.decode if self.landed else self.first

    @property
    def generated_ids(self) -> tuple[int, ...]:
        """What the next attempt need not say again. Several choices are said again from the start: they repeat what is here."""
        return tuple(self.choices[0].ids) if len(self.choices) == 1 else ()

    @property
    def has_news(self) -> bool:
        """Whether a reader would find something."""
        return any(choice.has_news for choice in self.choices)

    def again(self, *, attempt: int, first: str, decode: str = "") -> None:
        """Another attempt takes it up where the log ends; of the last one nothing is taken any more."""
        self.attempt, self.first, self.decode = attempt, first, decode
        self.needed = {first, decode} - {""}
        self.landed, self.error, self.at_fault, self.died = False, None, frozenset(), False
        self.spoke.clear()
        for choice in self.choices:
            choice.held.clear()

    def read(self) -> list[News]:
        """Everything not read so far, and mark it as read."""
        news: list[News] = []
        for index, choice in enumerate(self.choices):
            if not choice.has_news:
                continue
            finished = bool(choice.finish_reason) and not choice.finish_read
            news.append(
                News(
                    choice=index,
                    position=choice.num_read,
                    token_ids=tuple(choice.ids[choice.num_read :]),
                    finish_reason=choice.finish_reason,
                    logprobs=tuple(choice.logprobs[choice.num_read :]),
                    prompt_logprobs=() if choice.num_read else choice.prompt_logprobs,
                )
            )
            choice.num_read = len(choice.ids)
            choice.finish_read = finished
        return news


class Inflight:
    """All open requests of one master."""

    def __init__(self) -> None:
        self._logs: dict[str, RequestLog] = {}
        self.num_stale = 0
        self.num_diverged = 0

    def open(
        self,
        request_id: str,
        *,
        attempt: int,
        first: str,
        decode: str = "",
        max_tokens: int,
        num_choices: int = 1,
        told: tuple[int, ...] = (),
    ) -> RequestLog:
        """Begin a request. first, decode: incarnations. told: tokens that its reader has already. The request id must not be open already."""
        if request_id in self._logs:
            raise ValueError(f"request {request_id} is open already")
        log = RequestLog(
            request_id=request_id,
            attempt=attempt,
            first=first,
            decode=decode,
            max_tokens=max_tokens,
            needed={first, decode} - {""},
            choices=[ChoiceLog() for _ in range(num_choices)],
        )
        log.choices[0].ids += told
        log.choices[0].num_read = len(told)
        self._logs[request_id] = log
        return log

    def close(self, request_id: str) -> None:
        """Forget a request; what instances still say of it is stale."""
        self._logs.pop(request_id, None)

    def get(self, request_id: str) -> RequestLog | None:
        """An open request."""
        return self._logs.get(request_id)

    def take(self, request_id: str, entry: Entry) -> Judged:
        """Judge one entry and put it where it belongs."""
        log = self._logs.get(request_id)
        if log is None or not _is_current(log, entry) or log.error is not None:
            self.num_stale += 1
            return _STALE
        if entry.finish_reason and entry.finish_reason not in GOOD_FINISHES:
            return self._end(log, entry)
        choice = log.choices[entry.choice]
        judged = self._place(log, choice, entry)
        if judged.judgement is Judgement.DIVERGED:
            self._diverge(log)
        return judged

    def _end(self, log: RequestLog, entry: Entry) -> Judged:
        """An error entry ends the request, except when its answer is complete already."""
        if log.done:
            return Judged(Judgement.REPEATED, entry.position + 1, closed=True)
        code, message = entry.finish_reason, entry.message
        if code == "abort":  # nobody here asked for it
            code, message = "instance_lost", "the instance dropped the request; send it again"
        log.error, log.at_fault = (code, message or code), _at_fault(log, entry)
        return Judged(Judgement.ENDED, entry.position + 1, closed=True)

    def _place(self, log: RequestLog, choice: ChoiceLog, entry: Entry) -> Judged:
        position, known = entry.position, len(choice.ids)
        if position < known:
            return _compare(choice, entry)
        if choice.is_closed():
            closing = position == known and entry.token_id < 0
            same = closing and entry.finish_reason == choice.finish_reason
            return _closed(Judgement.REPEATED if same else Judgement.DIVERGED, choice)
        if position >= log.max_tokens and entry.token_id >= 0:
            return _closed(Judgement.DIVERGED, choice)
        if position > known:
            return _hold(log, choice, entry)
        log.spoke |= choice.append(entry)
        if log.decode in log.spoke:
            log.landed = True  # it speaks, so it has it
        _let_giver_go(log)
        return _closed(Judgement.APPENDED, choice)

    def _diverge(self, log: RequestLog) -> None:
        self.num_diverged += 1
        text = "two reports of the same answer differ; the request was ended. Send it again"
        log.error = ("internal_error", text)

    def on_verdict(self, request_id: str, attempt: int, incarnation: str, kind: str) -> bool:
        """The giver's one word on a handoff. False when it is of no open attempt."""
        log = self._logs.get(request_id)
        if log is None or log.attempt != attempt or log.first != incarnation:
            return False
        if kind == "landed":
            log.landed = True
            _let_giver_go(log)
        else:
            log.needed.discard(log.decode)
        return True

    def on_lost(self, incarnation: str, message: str, *, died: bool) -> list[str]:
        """An instance is gone: the requests that needed it end. died: not by its own will. Returns their ids."""
        ended = []
        for log in self._logs.values():
            if incarnation in log.needed and not log.done:
                log.error = ("instance_lost", message)
                log.at_fault, log.died = frozenset({incarnation}), died
                ended.append(log.request_id)
        return ended

    def ledger(self) -> dict[str, int]:
        """Counts; all 0 when idle."""
        choices = [choice for log in self._logs.values() for choice in log.choices]
        return {
            "open_requests": len(self._logs),
            "attempts": sum(1 for log in self._logs.values() if not log.done),
            "log_tokens": sum(len(choice.ids) + len(choice.held) for choice in choices),
        }


def _is_current(log: RequestLog, entry: Entry) -> bool:
    return (
        entry.attempt == log.attempt
        and entry.incarnation in (log.first, log.decode)
        and 0 <= entry.choice < len(log.choices)
        and entry.position >= 0
    )


def _at_fault(log: RequestLog, entry: Entry) -> frozenset[str]:
    """Whom an error is about. A giver tells what became of its offers too, so its word may be on the taker."""
    about = {entry.incarnation}
    if entry.incarnation == log.first and log.decode:
        about = {"queue_full": {log.first}, "draining": {log.first, log.decode}}.get(
            entry.finish_reason, {log.decode}
        )
    return frozenset(about)


def _let_giver_go(log: RequestLog) -> None:
    """Handed over, and what the giver had to say is here: nobody else can say the first tokens again."""
    if log.landed and all(choice.ids for choice in log.choices):
        log.needed.discard(log.first)


def _compare(choice: ChoiceLog, entry: Entry) -> Judged:
    """An entry of a position that the log has."""
    if entry.token_id != choice.ids[entry.position]:
        return _closed(Judgement.DIVERGED, choice)
    is_last = entry.position == len(choice.ids) - 1
    if entry.finish_reason and not (is_last and choice.finish_reason == entry.finish_reason):
        return _closed(Judgement.DIVERGED, choice)
    return _closed(Judgement.REPEATED, choice)


def _hold(log: RequestLog, choice: ChoiceLog, entry: Entry) -> Judged:
    """Keep an entry that is ahead. Only the giver's one token may still be on its way from elsewhere."""
    known = len(choice.ids)
    if len(choice.held) >= MAX_HELD:
        return Judged(Judgement.GAP, known)  # not kept: it comes again with the rest
    choice.held[entry.position] = entry
    giver_may_fill = entry.incarnation == log.decode and log.first in log.needed
    only_one = known + 1 in choice.held
    return Judged(Judgement.HELD if giver_may_fill and only_one else Judgement.GAP, known)


def _closed(judgement: Judgement, choice: ChoiceLog) -> Judged:
    return Judged(judgement, len(choice.ids), closed=bool(choice.finish_reason))
