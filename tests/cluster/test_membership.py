"""The life of an instance: every event in every state, and the stories that matter."""

from __future__ import annotations

import itertools

import pytest

from xllm_py.cluster.membership import (
    RECONNECT_S,
    STALLED_GONE_S,
    CardRemoved,
    CardSeen,
    Changed,
    Event,
    Heard,
    InstanceState,
    Overslept,
    Patience,
    Replaced,
    Spoke,
    StreamEnded,
    StreamOpened,
    Tick,
    View,
    may_serve,
    step,
)

PATIENCE = Patience(suspect_after_s=0.5, gone_after_s=1.0)
JOINING, READY = InstanceState.JOINING, InstanceState.READY
SUSPECT, DRAINING, GONE = InstanceState.SUSPECT, InstanceState.DRAINING, InstanceState.GONE


def story(*events: tuple[float, Event], view: View | None = None) -> View:
    """Play (seconds, event) pairs."""
    view = view or View()
    for now, event in events:
        view, _ = step(view, event, now, PATIENCE)
    return view


def ready() -> View:
    """A ready instance with an open stream, heard at second 0."""
    return story((0, CardSeen()), (0, StreamOpened()), (0, Heard()))


def test_a_card_and_a_heartbeat_make_it_ready() -> None:
    assert story((0, CardSeen())).state is JOINING
    assert story((0, CardSeen()), (9, Tick())).state is JOINING
    assert story((0, Heard())).state is JOINING
    assert ready().state is READY


@pytest.mark.parametrize("at, state", [(0.49, READY), (0.5, SUSPECT), (0.99, SUSPECT), (1.0, GONE)])
def test_silence_is_noticed_in_time(at: float, state: InstanceState) -> None:
    assert story((at, Tick()), view=ready()).state is state


def test_tokens_are_a_sign_of_life() -> None:
    assert story((0.4, Spoke()), (0.8, Tick()), view=ready()).state is READY


def test_a_suspect_that_speaks_is_ready_again() -> None:
    view = story((0.7, Tick()), view=ready())
    assert may_serve(view)
    assert story((0.8, Heard()), view=view).state is READY


def test_a_connection_that_ends_is_death_unless_it_comes_back_at_once() -> None:
    cut = story((0.1, StreamEnded()), (0.1 + RECONNECT_S / 2, Tick()), view=ready())
    assert cut.state is READY
    assert story((0.1 + RECONNECT_S, Tick()), view=cut).state is GONE
    back = story((0.12, StreamOpened()), (0.3, Heard()), (0.3, Tick()), view=cut)
    assert back.state is READY


def test_heartbeats_do_not_outlive_the_connection() -> None:
    view = story((0.1, StreamEnded()), (0.2, Heard()), view=ready())
    assert view.state is GONE


def test_an_instance_that_comes_back_joins_again() -> None:
    gone = story((2, Tick()), view=ready())
    assert gone.state is GONE
    assert story((3, Tick()), (3, Spoke()), (3, StreamOpened()), view=gone).state is GONE
    joining = story((3, Heard()), view=gone)
    assert joining.state is JOINING
    assert story((3.1, Heard()), view=joining).state is READY


def test_a_missing_card_of_a_living_instance_changes_nothing() -> None:
    assert story((0.1, CardRemoved()), (0.2, Heard()), view=ready()).state is READY


def test_a_stalled_engine_is_suspect_until_it_steps_again() -> None:
    stalled = story((0.1, Heard(stalled=True)), view=ready())
    assert stalled.state is SUSPECT
    assert story((0.2, Heard()), view=stalled).state is READY


def test_an_engine_that_stays_stalled_is_given_up_until_it_steps_again() -> None:
    beats: list[tuple[float, Event]] = [(n / 10, Heard(stalled=True)) for n in range(6)]
    assert story(*beats[:-1], view=ready()).state is SUSPECT
    gone = story(*beats, view=ready())
    assert (gone.state, gone.since) == (GONE, STALLED_GONE_S)
    still = story((31, Heard(stalled=True)), (31.1, Heard(stalled=True)), view=gone)
    assert still.state is GONE
    assert story((32, Heard()), view=still).state is JOINING


def test_draining_is_believed_and_ends_in_gone() -> None:
    draining = story((0.1, Heard(draining=True)), view=ready())
    assert draining.state is DRAINING
    assert not may_serve(draining)
    assert story((0.2, Heard()), view=draining).state is DRAINING
    assert story((1.5, Tick()), view=draining).state is GONE
    assert story((0, CardSeen(draining=True))).state is DRAINING


def test_a_judge_that_was_away_judges_nobody_for_it() -> None:
    away = Overslept(away_s=1.5, excused_s=1.0)
    assert story((1.5, Tick()), view=ready()).state is GONE
    awake = story((1.5, away), view=ready())
    assert story((1.5, Tick()), (1.99, Tick()), view=awake).state is READY
    assert story((2.0, Tick()), view=awake).state is SUSPECT
    assert story((2.5, Tick()), view=awake).state is GONE
    silent = story((0.4, Tick()), (1.9, away), view=ready())
    assert (
        story((2.0, Tick()), view=silent).state is SUSPECT
    )  # what was silent before goes on being so


def test_a_connection_that_broke_while_the_judge_was_away_may_come_back() -> None:
    awake = story((3, Overslept(away_s=3, excused_s=1.0)), (3.01, StreamEnded()), view=ready())
    assert story((3.5, Heard()), (3.9, Heard()), view=awake).state is READY
    back = story((3.5, StreamOpened()), (4.1, Heard()), view=awake)
    assert story((4.1, Tick()), view=back).state is READY
    assert story((3.9, Heard()), (4.0, Tick()), view=awake).state is GONE


def test_a_new_life_of_the_name_ends_the_old_one() -> None:
    assert story((0.1, Replaced()), view=ready()).state is GONE


def test_every_short_story_keeps_the_rules() -> None:
    events: tuple[Event, ...] = (
        CardSeen(),
        CardRemoved(),
        Heard(),
        Heard(draining=True),
        Heard(stalled=True),
        Spoke(),
        StreamOpened(),
        StreamEnded(),
        Tick(),
        Overslept(away_s=0.5, excused_s=1.0),
        Replaced(),
    )
    for length in (3, 4):
        for chosen in itertools.product(events, repeat=length):
            view, now = View(), 0.0
            for index, event in enumerate(chosen):
                now += (0.3, 0.02, 0.6)[index % 3]
                before = view.state
                view, changes = step(view, event, now, PATIENCE)
                assert len(changes) == (view.state is not before)
                assert all(change.before is before for change in changes)
                assert all(change.after is view.state for change in changes)
                if view.state is READY:
                    assert view.heard_at is not None
                if before is GONE:
                    assert view.state in (GONE, JOINING)
                if changes:
                    assert (view.since, bool(view.reason)) == (now, True)


def test_only_who_ended_has_died() -> None:
    def change(before: InstanceState, reason: str) -> Changed:
        return Changed(before, GONE, reason)

    assert change(READY, "its connection ended").is_death
    assert change(SUSPECT, "replaced by a new life of the same name").is_death
    assert not change(DRAINING, "its connection ended").is_death, "by its own will"
    assert not change(SUSPECT, "silent for 1.0 s").is_death
    assert not change(SUSPECT, "work is queued and no step is done").is_death
    assert not Changed(READY, SUSPECT, "its connection ended").is_death
