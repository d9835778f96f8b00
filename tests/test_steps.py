"""When a step becomes a row: the rule, by itself. Who logs, who dies and in what order is hypothesis's choice."""

from collections import Counter
from typing import NamedTuple

from backbone.steps import Steps

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = ("gone", "dead", "nothing")  # what becomes of the processes before a restart


class Report(NamedTuple):
    worker: str
    step: int
    attempt: int
    heard: float


class Kept(Steps):
    """Steps that keep what they are told, their rows and their warnings."""

    def __init__(self, workers: int):
        self.reports: list[Report] = []
        self.rows: list[tuple[int, dict[str, list[int]]]] = []
        self.warnings: list[tuple[str, str]] = []
        self.now = 0.0
        super().__init__(workers, lambda *row: self.rows.append(row), lambda *warning: self.warnings.append(warning))

    def say(self, worker: str, step: int, attempt: int = 0, commit: bool = False) -> None:
        self.reports.append(Report(worker, step, attempt, self.now))
        self.log(worker, step, len(self.reports) - 1, commit, self.now)

    def attempts(self, reports: dict[str, list[int]]) -> set[int]:
        return {self.reports[report].attempt for each in reports.values() for report in each}

    def restored(self) -> "Kept":
        """As a restarted pipeline actor makes them again, of what is in the store."""
        again = Kept(self.workers)
        again.reports, again.now, again.pace = [*self.reports], self.now, self.pace
        again.places, again.dead = dict(self.places), set(self.dead)
        still_open = {report for being in self.open.values() for each in being.reports.values() for report in each}
        for report in sorted(still_open):
            again.restore(self.reports[report].worker, self.reports[report].step, report, self.reports[report].heard)
        return again


def names(workers: int, generation: int = 0) -> list[str]:
    return [f"actor {generation}-{rank}" for rank in range(workers)]


class Turn(NamedTuple):
    """A call of `log`; `place` counts a worker's steps over all epochs."""

    place: int
    step: int
    attempt: int


def script(steps, attempt: int = 0, parts=lambda step: 1, first: int = 0) -> list[Turn]:
    return [Turn(first + i, step, attempt) for i, step in enumerate(steps) for _ in range(parts(step))]


def play(data: st.DataObject, kept: Kept, scripts: dict[str, list[Turn]], ahead: int) -> None:
    """The workers' turns in any order in which nobody is more than so many steps ahead of the slowest."""
    left = {worker: list(turns) for worker, turns in scripts.items()}
    while left := {worker: turns for worker, turns in left.items() if turns}:
        slowest = min(turns[0].place for turns in left.values())
        worker = data.draw(st.sampled_from([name for name in left if left[name][0].place <= slowest + ahead]))
        turn = left[worker].pop(0)
        kept.say(worker, turn.step, turn.attempt)


def assert_whole(kept: Kept, partial: int = 0) -> None:
    """Each report is in one row of its step, and no row mixes attempts; all but so many have all workers."""
    kept.finish()
    found = Counter(report for _, reports in kept.rows for each in reports.values() for report in each)
    assert found == Counter(range(len(kept.reports)))
    assert all(len(kept.attempts(reports)) == 1 for _, reports in kept.rows)
    assert sum(len(reports) < kept.workers for _, reports in kept.rows) <= partial


workers_and_parts = dict(data=st.data(), workers=st.integers(2, 4), parts=st.integers(1, 3), ahead=st.integers(0, 1))


@given(**workers_and_parts)
def test_workers_in_near_lock_step_make_whole_rows(data, workers, parts, ahead):
    kept = Kept(workers)
    play(data, kept, {name: script(range(6), parts=lambda _: parts) for name in names(workers)}, ahead)
    assert_whole(kept)
    assert [step for step, _ in kept.rows] == list(range(6))
    assert kept.warnings == []


@given(**workers_and_parts)
def test_rank_0_may_say_more_than_the_others(data, workers, parts, ahead):
    kept = Kept(workers)
    scripts = {name: script(range(6), parts=lambda _: parts) for name in names(workers)}
    scripts[names(workers)[0]] = script(range(6), parts=lambda step: parts + step % 2)
    play(data, kept, scripts, ahead)
    assert_whole(kept)
    assert len(kept.rows) == 6


@given(**workers_and_parts)
def test_after_a_rewind_the_steps_that_come_again_get_rows_of_their_own(data, workers, parts, ahead):
    kept = Kept(workers)
    for attempt, steps in enumerate((range(4), range(2, 6))):
        play(data, kept, {name: script(steps, attempt, lambda _: parts) for name in names(workers)}, ahead)
    assert_whole(kept)
    assert sorted(step for step, _ in kept.rows) == [0, 1, 2, 2, 3, 3, 4, 5]
    assert {kind for kind, _ in kept.warnings} == {"went back"}


@given(**workers_and_parts)
def test_epochs_may_count_from_0_again(data, workers, parts, ahead):
    kept = Kept(workers)
    epochs = [turn for epoch in range(3) for turn in script(range(4), epoch, lambda _: parts, first=4 * epoch)]
    play(data, kept, dict.fromkeys(names(workers), epochs), ahead)
    assert_whole(kept)
    assert Counter(step for step, _ in kept.rows) == {0: 3, 1: 3, 2: 3, 3: 3}


@given(**workers_and_parts, fate=st.sampled_from(ALL))
def test_a_restart_in_new_processes_mixes_no_attempts(data, workers, parts, ahead, fate):
    kept = Kept(workers)
    play(data, kept, {name: script(range(4), 0, lambda _: parts) for name in names(workers)}, ahead)
    end(kept, names(workers), fate)
    play(data, kept, {name: script(range(2, 6), 1, lambda _: parts) for name in names(workers, 1)}, ahead)
    assert_whole(kept)
    assert len(kept.rows) == 8


@given(**workers_and_parts, again_from=st.sampled_from([2, 3]))
def test_a_restart_that_cuts_a_step_leaves_that_row_partial_and_no_other(data, workers, parts, ahead, again_from):
    """Rank 0 is killed before it reported step 3; its death is known before the new ranks report."""
    kept, (first, *others) = Kept(workers), names(workers)
    scripts = {name: script(range(4), 0, lambda _: parts) for name in others}
    play(data, kept, scripts | {first: script(range(3), 0, lambda _: parts)}, ahead)
    end(kept, [first, *others], "dead")
    play(data, kept, {name: script(range(again_from, 6), 1, lambda _: parts) for name in names(workers, 1)}, ahead)
    assert_whole(kept, partial=1)


def end(kept: Kept, workers: list[str], fate: str) -> None:
    for worker in workers if fate != "nothing" else ():
        kept.gone(worker, kept.now, dead=fate == "dead")


@given(st.data())
def test_a_driver_that_logs_too_leaves_the_ranks_rows_whole(data):
    kept, ranks = Kept(4), names(4)
    for step in range(30):
        for worker in [*data.draw(st.permutations(ranks)), "process driver"]:
            kept.say(worker, step)
    kept.finish()
    assert sum(set(ranks) <= reports.keys() for _, reports in kept.rows) == 30
    assert len(kept.rows) <= 31


@given(st.data())
def test_tasks_of_one_step_make_its_row_as_soon_as_the_last_one_ends(data):
    kept = Kept(4)
    for step in range(5):
        for engine in data.draw(st.permutations(range(4))):
            kept.say(f"task {step}-{engine} 0", step)
            assert len(kept.rows) == step
            kept.gone(f"task {step}-{engine} 0", kept.now)
    assert [step for step, _ in kept.rows] == list(range(5))
    assert_whole(kept)


def test_a_committed_step_is_a_row_at_once():
    kept = Kept(2)
    kept.say("actor a", 0, commit=True)
    kept.say("actor b", 0)
    kept.say("actor b", 0, commit=True)
    assert kept.rows == [(0, {"actor a": [0], "actor b": [1, 2]})]


def test_a_worker_that_reports_a_step_it_had_committed_makes_another_attempt():
    kept = Kept(2)
    kept.say("actor a", 0, commit=True)
    kept.say("actor a", 0)
    assert kept.rows == [(0, {"actor a": [0]})]


def test_a_worker_is_done_with_a_step_once_however_often_it_says_so():
    kept = Kept(2)
    kept.say("actor a", 0, commit=True)
    kept.gone("actor a", kept.now)
    assert kept.rows == []


# Any order of any calls

ANYONE = st.sampled_from([*names(3), "task 1 0", "task 2 0"])
SAY = st.tuples(st.just("say"), ANYONE, st.integers(0, 3), st.sampled_from([False, False, False, True]))
EVENTS = st.one_of(
    *[SAY] * 5,
    st.tuples(st.sampled_from(["gone", "dead"]), ANYONE),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 30.0, 100.0])),
    st.tuples(st.just("expect"), st.integers(1, 3)),
)


def do(kept: Kept, event: tuple) -> None:
    match event:
        case "say", worker, step, commit:
            kept.say(worker, step, commit=commit)
        case ("gone" | "dead") as how, worker:
            kept.gone(worker, kept.now, dead=how == "dead")
        case "wait", seconds:
            kept.now += seconds
            kept.tick(kept.now)
        case "expect", workers:
            kept.expect(workers)


@settings(max_examples=300)
@given(st.integers(1, 3), st.lists(EVENTS, max_size=40))
def test_whatever_happens_each_report_is_in_one_row_of_its_step(workers, events):
    kept = Kept(workers)
    for event in events:
        do(kept, event)
    kept.finish()
    found = Counter()
    for step, reports in kept.rows:
        for worker, each in reports.items():
            found.update(each)
            assert {kept.reports[report][:2] for report in each} == {(worker, step)}
    assert found == Counter(range(len(kept.reports)))


@settings(max_examples=500)
@given(st.integers(1, 3), st.lists(EVENTS, max_size=15), st.lists(EVENTS, max_size=15))
def test_a_restart_of_the_pipeline_actor_changes_no_row(workers, before, after):
    kept = Kept(workers)
    for event in before:
        do(kept, event)
    again, kept.rows = kept.restored(), []
    for event in after:
        do(kept, event)
        do(again, event)
    kept.finish()
    again.finish()
    assert again.rows == kept.rows


def test_a_worker_s_parts_make_it_done_once_after_a_restart_too():
    kept = Kept(3)
    for step in (0, 0, 1):
        kept.say("actor a", step)
    again = kept.restored()
    for step in (0, 1):
        again.say("actor b", step)
    assert again.rows == []


# The clock


def test_engines_of_unequal_speed_make_whole_rows_only():
    kept, due, step = Kept(4), dict.fromkeys(names(4), 0.0), dict.fromkeys(names(4), 0)
    while min(due.values()) < 3600:
        engine = min(due, key=due.get)
        kept.now = due[engine]
        kept.tick(kept.now)
        kept.say(engine, step[engine])
        step[engine] += 1
        due[engine] += 1 + 0.1 * int(engine[-1]) / 3
    assert len(kept.open) > 100
    assert len(kept.rows) >= min(step.values()) - 1
    assert all(len(reports) == 4 for _, reports in kept.rows)
    assert kept.warnings == []


def test_a_rank_that_hangs_holds_a_row_up_for_a_minute_and_is_warned_of():
    kept = Kept(3)
    for second in range(400):
        kept.now = float(second)
        kept.tick(kept.now)
        for rank in names(3 if second < 100 else 2):
            kept.say(rank, second)
    assert 50 < len(kept.open) < 70
    assert kept.warnings[0] == (
        "few workers",
        "step 100 stands on 2 of 3 workers; pass workers=2 if no more log, call expect() if some have died",
    )
    kept.expect(2)
    assert len(kept.open) == 1  # that of now
    assert_whole(kept, partial=400)


def test_a_step_that_all_have_reported_waits_a_minute_for_more():
    kept = Kept(2)
    for kept.now, rank in [(10.0, "actor a"), (20.0, "actor b"), (50.0, "actor a")]:
        kept.say(rank, 0)
    kept.tick(109.0)
    assert kept.rows == []
    kept.tick(110.0)
    assert [step for step, _ in kept.rows] == [0]
    assert kept.warnings == []


def test_where_rows_are_slow_to_come_a_straggler_is_waited_for_accordingly():
    kept = Kept(2)
    for step in range(50):
        kept.now += 600
        for rank in names(2):
            kept.say(rank, step)
        kept.now += 10
        kept.tick(kept.now)
    kept.say(names(2)[0], 50)
    kept.now += 5000
    kept.tick(kept.now)
    assert len(kept.rows) == 50  # of which the last by the clock, as all had reported it
    kept.now += 3000
    kept.tick(kept.now)
    assert [(step, len(reports)) for step, reports in kept.rows[50:]] == [(50, 1)]


def test_how_slow_rows_are_is_known_after_a_restart():
    kept = Kept(1)
    for step in range(20):
        kept.now += 600
        kept.say("actor a", step)
    again = kept.restored()
    again.expect(2)
    again.tick(again.now + 600)
    assert again.rows == []
    again.tick(again.now + 6000)
    assert [step for step, _ in again.rows] == [19]


# At the end, and when there is too much


def test_the_end_makes_rows_of_all_open_steps_in_order():
    kept = Kept(2)
    for step in (3, 1, 2):
        kept.say("actor a", step)
    kept.finish()
    assert [step for step, _ in kept.rows] == [1, 2, 3]
    assert (kept.open, kept.places, kept.dead) == ({}, {}, set())


def test_fewer_expected_workers_complete_what_these_are_done_with():
    kept = Kept(2)
    for step in range(3):
        kept.say("actor a", step)
    kept.expect(1)
    assert [step for step, _ in kept.rows] == [0, 1]
    kept.say("actor a", 3)
    assert [step for step, _ in kept.rows] == [0, 1, 2]


def test_what_waits_is_bounded_and_nothing_of_it_is_dropped(monkeypatch):
    monkeypatch.setattr(Steps, "MAX_WAITING", 10)
    kept = Kept(2)
    for worker in ("actor a", "actor b"):
        for step in range(200):
            kept.say(worker, step)
            assert sum(len(each) for being in kept.open.values() for each in being.reports.values()) <= 10
    assert [step for step, _ in kept.rows[:190]] == list(range(190))  # the oldest first
    assert_whole(kept, partial=400)


# Who is a worker


def test_a_task_that_has_ended_does_not_die_when_its_process_does():
    """Its step is still open, and no newcomer may close it: the other tasks of the step are still to come."""
    kept = Kept(2)
    kept.say("task 1 0", 0)
    kept.gone("task 1 0", kept.now)
    kept.gone("task 1 0", kept.now, dead=True)
    kept.say("process driver", 0)
    assert kept.rows == []


def test_a_task_that_begins_ends_no_other():
    kept = Kept(2)
    for task in ("task 1 0", "task 2 0"):
        kept.say(task, 0)
    kept.say("task 3 0", 1)
    assert kept.rows == []


def test_a_worker_that_came_back_is_not_dead():
    kept = Kept(3)
    kept.say("actor a", 0)
    kept.gone("actor a", kept.now, dead=True)
    kept.say("actor a", 1)
    assert [step for step, _ in kept.rows] == [0]
    kept.say("actor b", 1)
    assert len(kept.rows) == 1


@pytest.mark.parametrize("engines", [2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_engines_whose_number_was_not_told_are_warned_of_with_that_number(engines, parts):
    kept = Kept(1)
    for step in range(20):
        for engine in names(engines):
            for _ in range(parts):
                kept.say(engine, step)
    told = [what for kind, what in kept.warnings if kind == "many workers"]
    assert told == [f"{engines} workers log to a pipeline that was told of 1: pass workers={engines}"]


def test_workers_that_take_each_other_s_place_are_no_more_than_were_told_of():
    kept = Kept(2)
    for generation in range(5):
        for step in range(3):
            for rank in names(2, generation):
                kept.say(rank, 3 * generation + step)
    assert kept.warnings == []
    assert_whole(kept)


def test_new_processes_that_go_back_are_told_of_like_old_ones():
    kept = Kept(1)
    for step in range(5):
        kept.say("actor a", step)
    kept.say("actor b", 2)
    assert kept.warnings == [("went back", "steps went back from 3 to 2: each attempt gets rows of its own")]
