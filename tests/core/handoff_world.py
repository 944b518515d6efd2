"""One handoff between a Giver and a real scheduler as taker, over calls and a link that fail in every way they can.

    control calls  P -> D, answered; any order, late (P has given up waiting), twice, or never
    link           frames in order, P -> D, and an acknowledgement back; cut at any moment
    people         abort the request at P or at D at any moment
    time           P's timers, D's expiry

`moves` lists what may happen next, `play` lets it happen, `check` says what must hold at every moment and `check_end` what
must hold when nothing more can happen. Faults (late, twice, cut, abort, expiry) are counted, so that a walk over all worlds is finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.core.toy_rig import FACTS, offer_of, submission
from xllm_py.core import handoff
from xllm_py.core.config import SchedulerConfig
from xllm_py.core.handoff import Giver, GiverState
from xllm_py.core.plan import StepResult
from xllm_py.core.request import FirstToken, OfferAnswer
from xllm_py.core.scheduler import Scheduler

NUM_BLOCKS = 2  # of the prompt
GRANT = b"grant of 16 byte"
NAME = "r"
FIRST = 7
FAULTS = ("late", "twice", "cut", "abort", "expire")


@dataclass
class World:
    """Everything that is true at one moment."""

    local_decode: bool = True
    ends_at_first: bool = False  # the first token is the whole answer
    full: bool = False  # D has no room until somebody else ends there
    now: float = 100.0
    faults: int = 0
    # P
    computed: int = 0
    place: str = "computing"  # then giving, kept, given, failed, ended
    complete: bool = False
    verdicts: list[str] = field(default_factory=list)
    # under way
    calls: list[str] = field(default_factory=list)  # P waits for an answer
    orphans: list[str] = field(default_factory=list)  # nobody waits for an answer
    answers: list[tuple[str, bool]] = field(
        default_factory=list
    )  # what was asked; granted or taken
    frames: list[int] = field(default_factory=list)  # blocks, and -1 for COMMIT
    acknowledged: bool = False  # an acknowledgement is on its way
    link_up: bool = True
    giver_unaware: bool = False  # the link is cut and P has not noticed
    taker_unaware: bool = False
    connected: bool = False  # P's transport knows the grant
    # D
    received: set[int] = field(default_factory=set)
    grant_open: bool = False  # D's transport would write under it
    release_due: bool = False
    landed: bool = False
    taken: bool = False  # the first token was accepted
    ran: bool = False
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.given = submission(NAME, [1, 2], 3, give=True, ignore_eos=True, timeout_s=1e6)
        self.giver = Giver(
            now=self.now,
            deadline=self.now + (0.2 if self.full else 1e6),  # two repeats are enough to walk
            local_decode=self.local_decode,
            jitter=0.0,
        )
        config = SchedulerConfig(max_seqs_per_batch=2, prefill_usage_threshold=1.0)
        self.taker = Scheduler(config, FACTS, NUM_BLOCKS + 2, 1)
        if self.full:
            other = submission("other", [1, 2, 3], 2, ignore_eos=True, timeout_s=1e6)
            self.taker.add(other, self.now)
            self.taker.schedule(self.now)
        self.act(self.giver.start())

    # ---- what may happen ----

    def moves(self, most_faults: int) -> list[tuple[str, int]]:
        """Names and an index each."""
        found: list[tuple[str, int]] = []
        if self.place == "computing" or (self.place == "kept" and self.computed < NUM_BLOCKS):
            found.append(("compute", 0))
        found += [("deliver", index) for index in range(len(self.calls))]
        found += [("orphan", index) for index in range(len(self.orphans))]
        found += [("answer", index) for index in range(len(self.answers))]
        single = {
            "frame": bool(self.frames) and self.link_up,
            "ack": self.acknowledged and self.link_up,
            "notice_p": self.giver_unaware,
            "notice_d": self.taker_unaware,
            "release": self.release_due,
            "tick": self.giver.next_tick is not None,
            "room": self.full,
            "step": self.running,
            "expire": self.reserved and not self.landed_and_told,
        }
        found += [(name, 0) for name, possible in single.items() if possible]
        if self.faults < most_faults:
            found += [("late", index) for index in range(len(self.calls))]
            found += [("twice", index) for index in range(len(self.calls))]
            if self.link_up and self.connected:
                found.append(("cut", 0))
            if self.place in ("computing", "giving", "kept"):
                found.append(("abort_p", 0))
            if self.reserved or self.running:
                found.append(("abort_d", 0))
            return found
        # an expiry is a fault too, unless nothing else can happen: time always goes on
        return [move for move in found if move[0] != "expire"] or found

    @property
    def reserved(self) -> bool:
        return self.taker.ledger()["requests_reserved"] == 1

    @property
    def running(self) -> bool:
        return not self.full and self.taker.ledger()["requests_running"] == 1

    @property
    def landed_and_told(self) -> bool:
        return self.landed and self.taken

    def play(self, move: tuple[str, int]) -> None:
        """Let one thing happen."""
        name, index = move
        if name in ("late", "twice", "cut", "abort_p", "abort_d", "expire"):
            self.faults += 1
        match name:
            case "deliver":
                call = self.calls.pop(index)
                answer = self.at_taker(call)
                if call != "cancel":
                    self.answers.append((call, answer))
            case "orphan":
                self.at_taker(self.orphans.pop(index))
            case "late":
                call = self.calls.pop(index)
                self.orphans.append(call)
                if call != "cancel":
                    self.on_no_answer(call)
            case "twice":
                self.orphans.append(self.calls[index])
            case "answer":
                self.on_answer(*self.answers.pop(index))
            case _:
                getattr(self, f"on_{name}")()
        if self.place in ("computing", "giving"):  # each turn of the loop ends so
            self.act(self.giver.on_computed(self.computed, self.place == "giving"))
        self.calls.sort()  # their order means nothing
        self.orphans.sort()

    # ---- P ----

    def act(self, actions: list[handoff.Action]) -> None:
        """What engine/giving does."""
        for action in actions:
            match action:
                case handoff.SendOffer():
                    self.calls.append("offer")
                case handoff.SendFirst():
                    self.calls.append("first")
                case handoff.CancelPeer():
                    self.calls.append("cancel")
                    self.abandon()
                case handoff.Connect():
                    self.connected = True
                    self.giver_unaware = not self.link_up
                case handoff.Push(first=first, count=count):
                    self.push(first, count)
                case handoff.Commit():
                    self.push(-1, 1)
                case handoff.Verdict(kind=kind):
                    self.verdicts.append(kind)
                case _:
                    self.settle(action)

    def settle(self, action: handoff.Action) -> None:
        self.abandon()
        assert self.place in ("computing", "giving"), (self.place, action)
        match action:
            case handoff.FreeBlocks():
                assert self.place == "giving"
                assert self.ran
                self.place = "given"
            case handoff.Keep():
                self.place = "kept"
            case handoff.Fail():
                self.place = "failed"

    def push(self, first: int, count: int) -> None:
        if self.link_up:
            self.frames += range(first, first + count)

    def abandon(self) -> None:
        """Frames that left are on their way; nobody listens to the link for this grant any more."""
        self.connected = self.giver_unaware = False

    def on_compute(self) -> None:
        self.computed += 1
        if self.place == "kept":
            return
        first, count = self.giver.claim(self.computed)
        self.push(first, count)
        done = self.computed == NUM_BLOCKS
        if done and self.ends_at_first:
            self.place, self.complete = "ended", True
            self.act(self.giver.on_ended(True))
        elif done:
            self.place = "giving"

    def on_answer(self, call: str, good: bool) -> None:
        if call == "first":
            self.act(self.giver.on_first_delivered(good, True, self.now))
        elif good:
            answer = OfferAnswer(request_id=NAME, attempt=1, grant=GRANT, num_blocks=NUM_BLOCKS)
            self.act(self.giver.on_answer(answer, self.now))
        else:
            self.refuse(self.refusals.pop(0))

    def on_no_answer(self, call: str) -> None:
        if call == "first":
            self.act(self.giver.on_first_delivered(False, False, self.now))
        else:
            self.refuse("unreachable")

    def refuse(self, reason: str) -> None:
        answer = OfferAnswer(request_id=NAME, attempt=1, refusal=reason, text=reason)
        self.act(self.giver.on_answer(answer, self.now))

    def on_tick(self) -> None:
        assert self.giver.next_tick is not None
        self.now = max(self.now, self.giver.next_tick)
        self.act(self.giver.on_tick(self.now))

    def on_ack(self) -> None:
        self.acknowledged = False
        if self.connected:
            self.act(self.giver.on_acknowledged())

    def on_notice_p(self) -> None:
        self.giver_unaware = False
        self.act(self.giver.on_link_failed("cut"))

    def on_abort_p(self) -> None:
        was, self.place = self.place, "ended"
        if was != "kept":
            self.act(self.giver.on_ended(False))

    # ---- D ----

    def at_taker(self, call: str) -> bool:
        match call:
            case "cancel":
                self.taker.abort(NAME, 1, self.now)
                self.revoke_ended()
                return True
            case "first":
                told = FirstToken(request_id=NAME, attempt=1, grant=GRANT, token_ids=(FIRST,))
                good = self.taker.on_first_token(told, self.now)
                self.taken = self.taken or good
                self.note_run()
                return good
        fresh = not self.grant_open and not self.landed
        answer = self.taker.reserve(offer_of(self.given), GRANT, self.now)
        if answer.grant:
            if fresh and self.reserved and not self.landed:
                self.grant_open = True
                self.taker_unaware = not self.link_up
        elif call in ("offer",):
            self.refusals.append(answer.refusal)
        return bool(answer.grant)

    def note_run(self) -> None:
        if self.running and not self.ran:
            self.ran = True
            assert self.received == set(range(NUM_BLOCKS))
            assert self.landed
            assert self.taken

    def revoke_ended(self) -> None:
        for _, _, grant in self.taker.take_ended_reservations():
            if not grant:
                continue  # it landed and was closed then
            self.grant_open = self.taker_unaware = False
            self.release_due = True

    def on_frame(self) -> None:
        frame = self.frames.pop(0)
        if not self.grant_open:
            self.frames.clear()  # an error frame ends the grant
            self.giver_unaware = self.connected
        elif frame >= 0:
            self.received.add(frame)
        elif self.received == set(range(NUM_BLOCKS)):
            self.landed, self.acknowledged = True, True
            self.grant_open, self.release_due = False, True
            self.taker_unaware = False
            self.taker.on_landed(NAME, 1, self.now)
            self.note_run()
        else:
            raise AssertionError(f"COMMIT with {self.received}")

    def on_notice_d(self) -> None:
        self.taker_unaware = False
        self.taker.on_reservation_lost(NAME, 1, self.now)
        self.revoke_ended()

    def on_release(self) -> None:
        self.release_due = False
        self.taker.released(NAME, 1)

    def on_expire(self) -> None:
        self.now += SchedulerConfig().grant_ttl_s
        self.on_room()
        self.taker.schedule(self.now)
        self.revoke_ended()

    def on_room(self) -> None:
        self.full = False
        self.taker.abort("other", 1, self.now)

    def on_step(self) -> None:
        plan = self.taker.schedule(self.now)
        self.taker.apply(plan, StepResult(token_ids=[9] * sum(plan.sample)), self.now)

    def on_abort_d(self) -> None:
        self.taker.abort(NAME, 1, self.now)
        self.revoke_ended()

    def on_cut(self) -> None:
        self.link_up = self.acknowledged = False
        self.frames.clear()
        self.giver_unaware = self.connected
        self.taker_unaware = self.grant_open

    # ---- what must hold ----

    def check(self) -> None:
        """At every moment."""
        assert len(self.verdicts) == int(self.giver.closed), self.verdicts
        assert not (self.ran and self.place == "kept"), "two owners"
        if self.ran and self.place == "failed":
            assert self.verdicts == ["lost"]
        if "landed" in self.verdicts:
            assert self.place == "given"
            assert self.ran
        if self.place == "given":
            assert self.verdicts == ["landed"]
        if self.ends_at_first:
            assert not self.ran
        counts = self.taker.ledger()
        held = counts["active"] + counts["staged"] + counts["quarantined"]
        if self.grant_open or (self.release_due and not self.landed):
            assert held >= NUM_BLOCKS, "somebody may still write into a free block"

    def check_end(self) -> None:
        """When nothing more can happen."""
        assert self.giver.closed, self.giver.state
        assert self.place != "computing"
        assert self.place != "giving"
        if self.complete:
            assert self.verdicts in (["finished_on_p"], ["refused"], ["lost"])
        assert not self.grant_open
        self.taker.assert_empty()
        if self.giver.state is GiverState.DONE:
            assert self.ran
