"""When a step becomes a row: the rule, by itself. Who logs, who dies and in what order is hypothesis's choice."""

import itertools
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from backbone.steps import Steps

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


class Report(NamedTuple):
    worker: str
    step: int
    attempt: int


class Pipeline:
    """Steps that are told what workers do, and what came of it. A worker whose name begins with "task" is a task.

    Behind a # is its attempt, if there are several.
    """

    def __init__(self, workers: int):
        self.steps, self.now = Steps(workers), 0.0
        self.reports: list[Report] = []

    def say(self, worker: str, step: int, attempt: int = 0, commit: bool = False, parent: str = "") -> None:
        self.reports.append(Report(worker, step, attempt))
        report, task = len(self.reports) - 1, worker.partition("#")[0] if worker.startswith("task") else ""
        self.steps.log(worker, step, report, commit, self.now, parent, task)

    def ends(self, *workers: str) -> None:
        """By themselves."""
        for worker in workers:
            self.steps.end(worker, self.now)

    def die(self, *workers: str) -> None:
        for worker in workers:
            self.steps.end(worker, self.now, died=True)

    def wait(self, seconds: float) -> None:
        """Looks at the clock once a second, as the pipeline actor does."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 1, end)
            self.steps.tick(self.now)

    def expect(self, workers: int) -> None:
        self.steps.expect(workers, self.now)

    def finish(self) -> None:
        self.steps.finish()

    def restarted(self) -> "Pipeline":
        """As a restarted pipeline actor finds it."""
        again = Pipeline(0)
        again.reports, again.now = [*self.reports], self.now
        again.steps = pickle.loads(pickle.dumps(self.steps))
        return again

    @property
    def rows(self) -> list[tuple[int, dict[str, list[int]]]]:
        return [(step, being.reports) for step, being in self.steps.over]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Each row's step and how many workers it stands on."""
        return [(step, len(being.workers)) for step, being in self.steps.over]

    @property
    def made(self) -> list[int]:
        """The steps of the rows."""
        return [step for step, _ in self.steps.over]

    def attempts(self, reports: Mapping[str, list[int]]) -> set[int]:
        return {self.reports[report].attempt for each in reports.values() for report in each}

    def check(self, partial: int = 0) -> None:
        """Each report is in one row of its step, no row mixes attempts, all rows but so many have all workers."""
        self.finish()
        found = Counter()
        for step, reports in self.rows:
            for worker, each in reports.items():
                found.update(each)
                assert {self.reports[report][:2] for report in each} == {(worker, step)}
            assert len(self.attempts(reports)) == 1, (step, reports)
        assert found == Counter(range(len(self.reports)))
        assert sum(n < self.steps.workers for _, n in self.sizes) <= partial


def names(workers: int, generation: int = 0) -> list[str]:
    return [f"actor {generation}-{rank}" for rank in range(workers)]


class Turn(NamedTuple):
    """A call of `log`; `place` counts a worker's steps over all epochs."""

    place: int
    step: int
    attempt: int


def script(steps, attempt: int = 0, parts=lambda step: 1, first: int = 0) -> list[Turn]:
    return [Turn(first + i, step, attempt) for i, step in enumerate(steps) for _ in range(parts(step))]


Choose = Callable[[list[str]], str]


def play(choose: Choose, made: Pipeline, scripts: Mapping[str, list[Turn]], ahead: int, commit: bool = False) -> None:
    """The workers' turns in any order in which nobody is more than so many steps ahead of the slowest."""
    left = {worker: list(turns) for worker, turns in scripts.items()}
    while left := {worker: turns for worker, turns in left.items() if turns}:
        slowest = min(turns[0].place for turns in left.values())
        worker = choose([name for name in left if left[name][0].place <= slowest + ahead])
        turn = left[worker].pop(0)
        made.say(worker, turn.step, turn.attempt, commit)


class Draw:
    """Hypothesis's choices."""

    def __init__(self, data: st.DataObject):
        self.data = data

    def __call__(self, names: list[str]) -> str:
        return self.data.draw(st.sampled_from(names))

    def order(self, names: Iterable[str]) -> list[str]:
        return self.data.draw(st.permutations([*names]))


choices = dict(data=st.data(), workers=st.integers(2, 4), parts=st.integers(1, 3), ahead=st.integers(0, 1))


# One life of each worker


@given(**choices)
def test_workers_in_near_lock_step_make_whole_rows(data, workers, parts, ahead):
    made = Pipeline(workers)
    play(Draw(data), made, {name: script(range(6), parts=lambda _: parts) for name in names(workers)}, ahead)
    made.check()
    assert made.made == list(range(6))
    assert made.steps.warnings == []


@given(**choices)
def test_rank_0_may_say_more_than_the_others(data, workers, parts, ahead):
    made = Pipeline(workers)
    scripts = {name: script(range(6), parts=lambda _: parts) for name in names(workers)}
    scripts[names(workers)[0]] = script(range(6), parts=lambda step: parts + step % 2)
    play(Draw(data), made, scripts, ahead)
    made.check()
    assert len(made.rows) == 6


@given(**choices)
def test_after_a_rewind_the_steps_that_come_again_get_rows_of_their_own(data, workers, parts, ahead):
    made = Pipeline(workers)
    for attempt, steps in enumerate((range(4), range(2, 6))):
        play(Draw(data), made, {name: script(steps, attempt, lambda _: parts) for name in names(workers)}, ahead)
    made.check()
    assert sorted(made.made) == [0, 1, 2, 2, 3, 3, 4, 5]
    assert {kind for kind, _ in made.steps.warnings} == {"went back"}


@given(**choices)
def test_epochs_may_count_from_0_again(data, workers, parts, ahead):
    made = Pipeline(workers)
    epochs = [turn for epoch in range(3) for turn in script(range(4), epoch, lambda _: parts, first=4 * epoch)]
    play(Draw(data), made, dict.fromkeys(names(workers), epochs), ahead)
    made.check()
    assert Counter(made.made) == {0: 3, 1: 3, 2: 3, 3: 3}


@given(st.data(), st.booleans())
def test_a_driver_that_logs_too_leaves_the_ranks_rows_whole(data, first):
    made, ranks = Pipeline(4), names(4)
    for step in range(30):
        order = Draw(data).order(ranks)
        for worker in ["process driver", *order] if first else [*order, "process driver"]:
            made.say(worker, step)
    made.finish()
    assert sum(set(ranks) <= reports.keys() for _, reports in made.rows) == 30
    assert len(made.rows) <= 31


def test_a_committed_step_is_a_row_at_once():
    made = Pipeline(2)
    made.say("actor a", 0, commit=True)
    made.say("actor b", 0)
    made.say("actor b", 0, commit=True)
    assert made.rows == [(0, {"actor a": [0], "actor b": [1, 2]})]


def test_two_steps_that_one_report_completes_become_rows_in_their_order():
    for step in range(100):
        pipeline = Pipeline(workers=1)
        pipeline.say("a", step)
        pipeline.say("a", step + 1, commit=True)
        assert [row for row, _ in pipeline.steps.over] == [step, step + 1]


def test_a_worker_that_reports_a_step_it_had_committed_makes_another_attempt():
    made = Pipeline(2)
    made.say("actor a", 0, commit=True)
    made.say("actor a", 0)
    assert made.rows == [(0, {"actor a": [0]})]


def test_a_worker_is_done_with_a_step_once_however_often_it_says_so():
    made = Pipeline(2)
    made.say("actor a", 0, commit=True)
    made.ends("actor a")
    made.die("actor a")
    assert made.rows == []


def test_who_logs_for_the_first_time_between_two_calls_for_a_step_splits_nothing():
    """All have reported the step, and will report more of it: the newcomer is no second attempt, as nobody has died."""
    made = Pipeline(2)
    for step in range(3):
        for rank in names(2):
            made.say(rank, step)
        made.say("process driver" if step == 1 else "actor 0-0", step)
        for rank in names(2):
            made.say(rank, step)
    made.finish()
    assert made.made == [0, 1, 2]


def test_a_newcomer_at_another_step_splits_nothing_either():
    made = Pipeline(2)
    for rank in names(2):
        made.say(rank, 0)
    made.say("process driver", 7)
    for rank in names(2):
        made.say(rank, 0)
        made.say(rank, 1)
    assert made.rows == [(0, {"actor 0-0": [0, 3], "actor 0-1": [1, 5]})]


# Restarts


FATES = pytest.mark.parametrize(("die", "later", "commit"), [(True, 0, False), (True, 30, False), (False, 0, False),
                                                           (False, 30, False), (True, 30, True)])  # fmt: skip


@FATES
@settings(max_examples=40)
@given(**choices)
def test_a_restart_in_new_processes_mixes_no_attempts(data, workers, parts, ahead, die, later, commit):
    """Whether the old ones died or ended by themselves, and whether the new ones come at once or much later."""
    made, draw = Pipeline(workers), Draw(data)
    play(draw, made, {name: script(range(4), 0, lambda _: parts) for name in names(workers)}, ahead)
    (made.die if die else made.ends)(*names(workers))
    made.wait(later)
    again = {name: script(range(2, 6), 1, lambda _: 1 if commit else parts) for name in names(workers, 1)}
    play(draw, made, again, ahead, commit)
    made.check()
    assert len(made.rows) == 8


@pytest.mark.parametrize("later", [0, 30])
@settings(max_examples=60)
@given(**choices, again_from=st.sampled_from([2, 3]))
def test_a_restart_that_cuts_a_step_leaves_that_row_partial_and_no_other(
    data, workers, parts, ahead, again_from, later
):
    """Rank 0 is killed before it reported step 3, then all are; the new ranks begin at that step or before it."""
    made, draw, (first, *others) = Pipeline(workers), Draw(data), names(workers)
    scripts = {name: script(range(4), 0, lambda _: parts) for name in others}
    play(draw, made, scripts | {first: script(range(3), 0, lambda _: parts)}, ahead)
    made.die(*names(workers))
    made.wait(later)
    play(draw, made, {name: script(range(again_from, 6), 1, lambda _: parts) for name in names(workers, 1)}, ahead)
    made.check(partial=1)


def test_an_attempt_that_did_not_end_is_not_mixed_with_the_one_after_the_next_death():
    """One of two ranks dies in the middle of a step; its successor's report of this step is the second attempt."""
    made = Pipeline(2)
    made.say("actor a", 0)
    made.say("actor b", 0)
    made.die("actor a")
    made.say("second life of a", 0, attempt=1)
    made.say("actor b", 1, attempt=1)
    assert made.rows == [(0, {"actor a": [0], "actor b": [1]})]


def test_new_processes_that_go_back_are_told_of_like_old_ones():
    made = Pipeline(1)
    for step in range(5):
        made.say("actor a", step)
    made.say("actor b", 2)
    assert made.steps.warnings == [("went back", "steps went back from 3 to 2: each attempt gets rows of its own")]


def test_who_was_taken_for_dead_and_logs_on_shares_rows_as_before():
    """Somebody had removed its outbox."""
    pipeline = Pipeline(2)
    for step in range(3):
        pipeline.say("a", step)
        pipeline.say("b", step)
        if step == 0:
            pipeline.die("a")
    pipeline.die("b")
    for step in range(3, 6):
        pipeline.say("a", step)
        pipeline.say("c", step)
    pipeline.finish()
    assert [step for step, _ in pipeline.rows if step > 2] == [3, 4, 5]
    assert pipeline.sizes[-3:] == [(3, 2), (4, 2), (5, 2)]


def test_a_task_that_logs_on_after_its_goodbye_is_alive_again():
    """Its handle was gone, and came back. Only what it says last is its end."""
    made = Pipeline(2)
    made.say("task a", 0)
    made.ends("task a")
    made.say("task a", 1)
    made.say("task b", 0)
    made.say("task b", 1)
    made.ends("task b")
    assert made.made == [0]
    made.ends("task a")
    assert made.made == [0, 1]


# Workers that end while the others go on


def seconds(made: Pipeline, count: int) -> Iterable[int]:
    for second in range(count):
        yield second
        made.wait(1)


@pytest.mark.parametrize("die", [True, False])
def test_ten_seconds_after_the_end_of_a_rank_rows_come_as_before(die):
    made, late = Pipeline(3), {}
    for second in seconds(made, 400):
        if second == 100:
            (made.die if die else made.ends)("actor 0-2")
        for rank in names(3 if second < 100 else 2):
            made.say(rank, second)
        late |= {step: second - step for step in made.made if step not in late}
    assert len(made.steps.open) == 1  # that of now
    assert max(delay for step, delay in late.items() if step > 111) <= 1
    assert 10 <= max(late.values()) <= 12
    assert made.sizes == [(step, 3 if step < 100 else 2) for step in range(399)]
    assert made.steps.warnings == []


@pytest.mark.parametrize("back_after", [3, 30])
def test_a_rollout_worker_that_dies_and_its_successor_never_share_a_row(back_after):
    """The successor goes on where it stood, at a step of its own."""
    chance, made, alive = random.Random(1), Pipeline(4), names(4)
    step = dict.fromkeys(alive, 0)
    dead, new = alive[3], "successor"
    for second in seconds(made, 300):
        if second == 100:
            made.die(alive.pop())
        if second == 100 + back_after:
            step[new] = step[dead]
            alive.append(new)
        for worker in chance.sample(alive, len(alive)):
            made.say(worker, step[worker], attempt=worker == new)
            step[worker] += 1
    made.finish()
    assert not [reports for _, reports in made.rows if {dead, new} <= reports.keys()]
    assert sum(n < 4 for _, n in made.sizes) <= 3 * back_after
    assert sum(n == 4 for _, n in made.sizes) >= 300 - 3 * back_after


@pytest.mark.parametrize("late", [True, False])
def test_a_task_s_retry_gets_no_row_with_the_attempt_before_whose_end_nobody_has_told(late):
    """It may have been on another node: what a relay brings comes later."""
    made = Pipeline(3)
    made.say("actor", 5)
    made.say("task x#0", 5)
    made.say("task x#1", 5, attempt=1)
    if late:
        made.say("task x#0", 5)
        made.say("task x#1", 5, attempt=1)
    made.die("task x#0")
    made.finish()
    rows = [{made.reports[i].attempt for ids in row.reports.values() for i in ids} for _, row in made.steps.over]
    assert rows == [{0}, {1}] * (1 + late)


def test_a_task_s_retry_gets_no_row_with_the_attempt_that_died():
    made = Pipeline(2)
    made.say("task x 0", 0)
    made.die("task x 0")
    made.say("task y 0", 0, attempt=1)
    made.ends("task y 0")
    made.say("task x 1", 0, attempt=1)
    made.ends("task x 1")
    made.check(partial=1)
    assert made.sizes == [(0, 1), (0, 2)]


def test_actors_that_end_when_they_are_through_leave_whole_rows():
    """Each has 20 steps; the slowest needs four times as long as the fastest."""
    made, step = Pipeline(4), dict.fromkeys(names(4), 0)
    for second in seconds(made, 100):
        for slowness, actor in enumerate(names(4), 1):
            if step[actor] < 20 and second % slowness == 0:
                made.say(actor, step[actor])
                step[actor] += 1
                if step[actor] == 20:
                    made.ends(actor)
    made.check()
    assert made.made == list(range(20))


@pytest.mark.parametrize("die", [True, False])
def test_a_helper_that_logs_once_and_ends_is_taken_for_no_engine(die):
    """Beside four engines, of which one is always a step behind."""
    chance, made, engines = random.Random(2), Pipeline(4), names(4)
    for second in seconds(made, 200):
        if second == 50:
            made.say("helper", 50)
            (made.die if die else made.ends)("helper")
        for engine in chance.sample(engines[:3], 3):
            made.say(engine, second)
        if second:
            made.say(engines[3], second - 1)
    made.finish()
    without = [len(reports.keys() - {"helper"}) for _, reports in made.rows]
    assert sum(n < 4 for n in without) <= 3
    assert sum(n == 4 for n in without) >= 197


def test_an_actor_that_comes_back_a_step_behind_costs_few_rows():
    made = Pipeline(3)
    for second in seconds(made, 200):
        if second == 100:
            made.die("actor c")
        made.say("actor a", second)
        made.say("actor b", second)
        if second and not 100 <= second < 105:
            made.say("actor c" if second < 100 else "second life of c", second - 1, attempt=second >= 100)
    made.finish()
    assert sum(n < 3 for _, n in made.sizes) <= 8
    assert sum(n == 3 for _, n in made.sizes) >= 190


def test_workers_that_are_expected_to_be_fewer_may_die_a_moment_later():
    made, ranks = Pipeline(4), names(4)
    for second in seconds(made, 200):
        if second == 100:
            made.expect(3)
            made.die(ranks[3])
        for rank in ranks if second < 100 else ranks[:2]:
            made.say(rank, second)
        if second > 100:
            made.say(ranks[2], second - 1)
    sizes = dict(made.sizes)
    assert {sizes[step] for step in range(116, 197)} == {3}


def test_workers_that_take_each_other_s_place_are_no_more_than_were_told_of():
    made = Pipeline(2)
    for generation in range(5):
        for step in range(3):
            for rank in names(2, generation):
                made.say(rank, 3 * generation + step)
        made.ends(*names(2, generation))
    assert made.steps.warnings == []
    made.check()


# Actors and tasks that are made anew for each step


@pytest.mark.parametrize("gap", [2, 20])
@pytest.mark.parametrize("together", [True, False])
def test_actors_made_anew_for_each_step_make_one_row_a_step(gap, together):
    """They commit, and are killed when both are through; or each ends by itself as soon as it is."""
    made = Pipeline(2)
    for step in range(50):
        actors = [f"{name}{step}" for name in "ab"]
        for actor in actors:
            made.say(actor, step, commit=together)
            made.wait(0.5)
            if not together:
                made.ends(actor)
        if together:
            made.die(*actors)
        made.wait(gap)
    made.check()
    assert made.made == list(range(50))


@pytest.mark.parametrize("gap", [2, 20])
def test_a_driver_that_has_logged_once_does_not_split_the_rows_of_actors_made_anew(gap):
    made = Pipeline(4)
    made.say("process driver", 0, commit=True)
    for step in range(50):
        for name in "abcd":
            made.say(f"{name}{step}", step)
            made.wait(0.5)
            made.ends(f"{name}{step}")
        made.wait(gap)
    made.finish()
    assert len(made.rows) <= 51
    assert sum(n >= 4 for _, n in made.sizes) >= 49


def test_shards_that_run_two_at_a_time_make_whole_rows():
    """The first two have ended before the others begin."""
    made = Pipeline(4)
    for pair in (names(4)[:2], names(4)[2:]):
        for step in range(20):
            for shard in pair:
                made.say(shard, step)
        made.ends(*pair)
    made.check()
    assert len(made.rows) == 20


@given(st.data())
def test_tasks_of_one_step_make_its_row_as_soon_as_the_last_one_ends(data):
    made = Pipeline(4)
    for step in range(5):
        for engine in Draw(data).order(names(4)):
            made.say(f"task {step} {engine}", step)
            assert len(made.rows) == step
            made.ends(f"task {step} {engine}")
    assert made.made == list(range(5))
    made.check()


def test_the_last_of_a_step_s_tasks_is_waited_for_though_others_ended_long_ago():
    made = Pipeline(3)
    for second, task in enumerate("ab"):
        made.now = 20.0 * second
        made.say(f"task {task}", 0)
        made.ends(f"task {task}")
    made.wait(30)
    assert made.rows == []
    made.say("task c", 0)
    made.ends("task c")
    assert made.sizes == [(0, 3)]


def test_where_tasks_report_a_step_no_actor_that_has_ended_is_taken_for_one_of_them():
    made = Pipeline(3)
    for worker in ("actor a", "task b"):
        made.say(worker, 0)
    made.ends("actor a")
    for task in ("task b", "task c"):
        made.say(task, 1, commit=True)
    made.wait(20)
    assert 1 not in made.made
    made.say("task d", 1, commit=True)
    assert (1, 3) in made.sizes


def test_a_task_that_has_ended_does_not_die_when_its_process_does():
    """Its step is still open, and no newcomer may close it: the other tasks of the step are still to come."""
    made = Pipeline(2)
    made.say("task 1 0", 0)
    made.ends("task 1 0")
    made.die("task 1 0")
    made.say("process driver", 0)
    assert made.rows == []


def test_a_task_that_begins_ends_no_other():
    made = Pipeline(2)
    for task in ("task 1 0", "task 2 0"):
        made.say(task, 0)
    made.say("task 3 0", 1)
    assert made.rows == []


# Children


def test_children_and_their_parent_are_one_worker():
    """Two of its data loaders log what it logs as well; the other rank is still waited for."""
    made = Pipeline(2)
    for step in range(3):
        made.say("actor a", step)
        for child in ("loader 1", "loader 2"):
            made.say(child, step, parent="actor a")
    assert made.rows == []
    for step in range(3):
        made.say("actor b", step)
    assert made.sizes == [(0, 2), (1, 2)]
    assert {*made.rows[0][1]} == {"actor a", "loader 1", "loader 2", "actor b"}
    made.wait(1)
    assert made.steps.warnings == []


def test_a_child_has_a_place_of_its_own_in_the_steps():
    """It may be behind its parent, whose step is not over before the child is done with it."""
    made = Pipeline(1)
    made.say("actor a", 0)
    made.say("loader", 0, parent="actor a")
    made.say("actor a", 1)
    assert made.rows == []
    made.say("loader", 0, parent="actor a")
    made.say("loader", 1, parent="actor a")
    assert made.rows == [(0, {"actor a": [0], "loader": [1, 3]})]


def test_a_child_s_end_is_no_death():
    """Who logs for the first time after it is no second attempt."""
    made = Pipeline(3)
    for rank in names(2):
        made.say(rank, 0)
    made.say("loader", 0, parent=names(2)[0])
    made.die("loader")
    made.say("actor c", 0)
    assert made.rows == []
    for worker in (*names(2), "actor c"):
        made.say(worker, 1)
    assert made.sizes == [(0, 3)]


def test_a_child_s_end_is_not_that_of_a_worker():
    """Ten seconds later the rank that has not come yet is still waited for."""
    made = Pipeline(3)
    for rank in names(2):
        made.say(rank, 0)
    made.say("loader", 0, parent=names(2)[0])
    made.ends("loader")
    for rank in names(2):
        made.say(rank, 1, commit=True)
    made.wait(20)
    assert made.rows == []
    made.say("actor c", 1, commit=True)
    assert made.sizes == [(1, 3)]


def test_a_child_that_logs_for_its_parent_alone_is_that_worker():
    made = Pipeline(2)
    for step in range(3):
        made.say("loader", step, parent="actor a")
        made.say("actor b", step)
    assert made.sizes == [(0, 2), (1, 2)]


# Any order of any calls

ANYONE = st.sampled_from([*names(3), "task 1 0", "task 2 0", "loader"])
SAY = st.tuples(st.just("say"), ANYONE, st.integers(0, 3), st.sampled_from([False, False, False, True]))
EVENTS = st.one_of(
    *[SAY] * 5,
    st.tuples(st.sampled_from(["ends", "die"]), ANYONE),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 11.0, 30.0, 100.0])),
    st.tuples(st.just("expect"), st.integers(1, 3)),
)


def do(made: Pipeline, event: tuple) -> None:
    match event:
        case "say", worker, step, commit:
            made.say(worker, step, commit=commit, parent=names(3)[0] if worker == "loader" else "")
        case ("ends" | "die" | "expect") as what, whom:
            getattr(made, what)(whom)
        case "wait", seconds:
            made.now += seconds - 1
            made.wait(1)


@settings(max_examples=300)
@given(st.integers(1, 3), st.lists(EVENTS, max_size=40))
def test_whatever_happens_each_report_is_in_one_row_of_its_step(workers, events):
    made = Pipeline(workers)
    for event in events:
        do(made, event)
    made.finish()
    found = Counter()
    for step, reports in made.rows:
        for worker, each in reports.items():
            found.update(each)
            assert {made.reports[report][:2] for report in each} == {(worker, step)}
    assert found == Counter(range(len(made.reports)))
    assert (made.steps.open, made.steps._waiting) == ({}, 0)


@settings(max_examples=250)
@given(st.integers(1, 3), st.lists(EVENTS, max_size=15), st.lists(EVENTS, max_size=15))
def test_a_restart_of_the_pipeline_actor_changes_no_row(workers, before, after):
    made = Pipeline(workers)
    for event in before:
        do(made, event)
    again = made.restarted()
    for event in after:
        do(made, event)
        do(again, event)
    made.finish()
    again.finish()
    assert again.rows == made.rows
    assert again.steps.warnings == made.steps.warnings


def test_who_died_before_a_restart_of_the_pipeline_actor_is_not_waited_for_after_it():
    made = Pipeline(3)
    for rank in names(3):
        made.say(rank, 0)
    made.die(names(3)[2])
    for rank in names(2):
        made.say(rank, 1, commit=True)
    again = made.restarted()
    again.wait(9)
    assert again.made == [0]
    again.wait(2)
    assert again.sizes == [(0, 3), (1, 2)]


def test_what_is_pickled_does_not_grow_with_what_is_over():
    made, sizes = Pipeline(3), []
    for step in range(400):
        for worker in names(3):
            made.say(worker, step)
        made.steps.over.clear()  # as the pipeline takes them
        sizes.append(len(pickle.dumps(made.steps)))
    assert max(sizes[200:]) < 1.1 * max(sizes[:200])


# The clock


@pytest.mark.parametrize("commit", [False, True])
def test_engines_of_unequal_speed_make_whole_rows_only(commit):
    """The fastest is a tenth faster, and so in the end 180 steps ahead: the slowest is waited for."""
    made, due, step = Pipeline(4), dict.fromkeys(names(4), 0.0), dict.fromkeys(names(4), 0)
    while min(due.values()) < 1800:
        engine = min(due, key=due.get)
        made.now = due[engine]
        made.steps.tick(made.now)
        made.say(engine, step[engine], commit=commit)
        step[engine] += 1
        due[engine] += 1 + 0.1 * int(engine[-1]) / 3
    assert len(made.steps.open) > 50
    assert len(made.rows) >= min(step.values()) - 1
    assert {n for _, n in made.sizes} == {4}
    assert made.steps.warnings == []


def test_a_rank_that_hangs_holds_a_row_up_for_a_minute_and_is_named():
    made = Pipeline(3)
    for second in range(400):
        made.now = float(second)
        made.steps.tick(made.now)
        for rank in names(3 if second < 100 else 2):
            made.say(rank, second)
    assert 50 < len(made.steps.open) < 70
    assert made.steps.warnings[0] == (
        "few workers",
        "step 100 stands on 2 of 3 workers; nothing was heard of actor 0-2: pass workers=2 if no more log",
    )
    made.expect(2)
    assert len(made.steps.open) == 1  # that of now
    made.check(partial=400)


def test_of_many_that_are_silent_three_are_named():
    made = Pipeline(6)
    for worker in names(6):
        made.say(worker, 0)
    made.say(names(6)[0], 1)
    made.wait(61)
    [(_, told)] = made.steps.warnings
    assert "nothing was heard of actor 0-1, actor 0-2, actor 0-3 and others: pass workers=1" in told


def test_a_step_that_all_have_reported_waits_a_minute_for_more():
    made = Pipeline(2)
    for made.now, rank in [(10.0, "actor a"), (20.0, "actor b"), (50.0, "actor a")]:
        made.say(rank, 0)
    made.steps.tick(109.0)
    assert made.rows == []
    made.steps.tick(110.0)
    assert made.made == [0]
    assert made.steps.warnings == []


def test_who_was_heard_of_at_a_lower_step_is_waited_for_and_nobody_else():
    """Also where it has committed that step: it stands there until it reports another one."""
    made = Pipeline(2)
    made.say("actor a", 5)
    made.say("actor b", 3, commit=True)
    for _ in range(10):
        made.wait(50)
        made.say("actor b", 3, commit=True)
    assert 5 not in made.made
    made.wait(100)
    assert (5, 1) in made.sizes


def test_who_is_ahead_is_not_waited_for():
    made = Pipeline(2)
    made.say("actor a", 5)
    made.say("actor b", 9)
    made.wait(50)
    made.say("actor b", 9)
    made.wait(11)
    assert made.sizes == [(5, 1)]


def test_where_rows_are_slow_to_come_a_straggler_is_waited_for_accordingly():
    made = Pipeline(2)
    for step in range(50):
        made.now += 600
        for rank in names(2):
            made.say(rank, step)
        made.now += 10
        made.steps.tick(made.now)
    made.say(names(2)[0], 50)
    made.now += 5000
    made.steps.tick(made.now)
    assert len(made.rows) == 50  # of which the last by the clock, as all had reported it
    made.now += 3000
    made.steps.tick(made.now)
    assert made.sizes[50:] == [(50, 1)]


@pytest.mark.parametrize(("workers", "told"), [(2, []), (4, ["no step had 4 workers: pass workers=2"])])
def test_in_a_run_too_short_for_the_clock_too_many_workers_are_told_at_its_end(workers, told):
    made = Pipeline(workers=workers)
    for step in range(5):
        made.say("a", step)
        made.say("b", step)
    made.finish()
    assert [what for _, what in made.steps.warnings] == told


def test_where_the_clock_has_made_whole_rows_nobody_is_told_of_too_few_workers_at_the_end():
    made = Pipeline(workers=2)
    for step in range(3):
        for worker in ("actor a", "actor b"):
            made.say(worker, step)
        made.now += 120  # a step of two minutes
        made.steps.tick(made.now)
    made.say("actor a", 3)
    made.finish()
    assert (made.sizes, made.steps.warnings) == ([(0, 2), (1, 2), (2, 2), (3, 1)], [])


def test_how_slow_rows_are_is_known_after_a_restart():
    made = Pipeline(1)
    for step in range(20):
        made.now += 600
        made.say("actor a", step)
    made.steps.over.clear()
    again = made.restarted()
    again.expect(2)
    again.steps.tick(again.now + 600)
    assert again.rows == []
    again.steps.tick(again.now + 6000)
    assert again.made == [19]


# At the end, and when there is too much


def test_the_end_makes_rows_of_all_open_steps_in_order():
    made = Pipeline(2)
    for step in (3, 1, 2):
        made.say("actor a", step)
    made.finish()
    assert made.made == [1, 2, 3]
    assert made.steps.open == {}


def test_after_the_end_steps_may_come_again():
    """A view's `finish` closes its steps, and it may be logged to after that."""
    made = Pipeline(2)
    made.say("actor a", 0)
    made.finish()
    for worker in ("actor a", "actor b"):
        made.say(worker, 0, commit=True)
    assert made.sizes == [(0, 1), (0, 2)]


def test_fewer_expected_workers_complete_what_these_are_done_with():
    made = Pipeline(2)
    for step in range(3):
        made.say("actor a", step)
    made.expect(1)
    assert made.made == [0, 1]
    made.say("actor a", 3)
    assert made.made == [0, 1, 2]


def test_who_ended_before_workers_were_told_of_is_not_counted_among_them():
    made = Pipeline(3)
    for worker in ("actor a", "actor b", "actor c"):
        made.say(worker, 0)
    made.die("actor c")
    made.wait(20)
    made.expect(3)  # another one will come
    for worker in ("actor a", "actor b"):
        made.say(worker, 1)
        made.say(worker, 2)
    made.wait(20)
    assert made.made == [0]


def test_what_waits_is_bounded_and_nothing_of_it_is_dropped(monkeypatch):
    monkeypatch.setattr(Steps, "MAX_WAITING", 10)
    made = Pipeline(2)
    for worker in ("actor a", "actor b"):
        for step in range(200):
            made.say(worker, step)
            assert sum(len(each) for being in made.steps.open.values() for each in being.reports.values()) <= 10
    assert made.made[:190] == list(range(190))  # the oldest first
    made.check(partial=400)


@pytest.mark.parametrize("kind", ["task", "actor"])
@pytest.mark.parametrize("die", [True, False])
def test_memory_follows_what_is_alive(kind, die):
    """Not the tasks and actors that there have been: 10,000 and 2,000, two for each step."""
    made, known = Pipeline(2), 0
    for step in range(5_000 if kind == "task" else 1_000):
        two = [f"{kind} {name}{step}" for name in "ab"]
        for worker in two:
            made.steps.log(worker, step, step, False, float(step), "", worker if kind == "task" else "")
        for worker in two:
            made.steps.end(worker, float(step), died=die)
        known = max(known, len(made.steps.known))
        assert len(made.steps.over) == 1
        made.steps.over.clear()
    assert known <= 10 + 100 + 2 * made.steps.workers
    assert len(made.steps._ended) <= 100 + 2 * made.steps.workers


# Cost


def seconds_of(workers: int, ended: int) -> float:
    """CPU time of a report where so many workers log, and so many have ended before; the best of some."""

    def play() -> float:
        made, names_ = Steps(workers), [f"actor {i}" for i in range(workers)]
        for name in (*names_, *(f"former {i}" for i in range(ended))):
            made.log(name, 0, 0, False, 0.0)
        for i in range(ended):
            made.end(f"former {i}", 0.0, died=True)
        turns = [(name, step) for step in range(1, 1 + 20_000 // workers) for name in names_]
        began = time.process_time()
        for name, step in turns:
            made.log(name, step, 0, False, 100.0)
        return (time.process_time() - began) / len(turns)

    return min(play() for _ in range(3))


@pytest.mark.parametrize("ended", [0, 5])
def test_a_report_costs_about_the_same_with_a_thousand_workers_as_with_ten(ended):
    """Keep counters, not scans: a scan over the workers for each report would take a hundred times as long."""
    assert seconds_of(1000, ended) < 8 * seconds_of(10, ended)


def test_a_look_at_the_clock_costs_no_more_than_a_few_reports_of_each_worker():
    """With 1,000 workers, of which each is at one of a hundred open steps."""
    made, workers = Pipeline(1000), names(1000)
    reporting, looking = [], []
    for first in range(3):
        began = time.process_time()
        for i, worker in enumerate(workers):
            made.say(worker, first + i % 100)
        reporting.append(time.process_time() - began)
        began = time.process_time()
        made.wait(1)
        looking.append(time.process_time() - began)
    assert len(made.steps.open) >= 100
    assert min(looking) < 10 * min(reporting)


# Who is a worker


@pytest.mark.parametrize("engines", [2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_engines_whose_number_was_not_told_are_warned_of_with_that_number(engines, parts):
    made = Pipeline(1)
    for step in range(20):
        for engine, _ in itertools.product(names(engines), range(parts)):
            made.say(engine, step)
    made.wait(1)
    told = [what for kind, what in made.steps.warnings if kind == "many workers"]
    assert told == [f"{engines} workers log to a pipeline that was told of 1: pass workers={engines}"]


def test_tasks_whose_number_was_not_told_are_warned_of_too():
    """Four run at the same time, and end when all have logged."""
    made = Pipeline(2)
    tasks = [f"task {i}" for i in range(4)]
    for task in tasks:
        made.say(task, 0)
    made.ends(*tasks)
    made.finish()
    assert [what for kind, what in made.steps.warnings if kind == "many workers"] == [
        "4 workers log to a pipeline that was told of 2: pass workers=4"
    ]
