"""From outboxes to numbered rows: what comes in gets into rows once and in order, whatever fails.

Without Ray, and mostly before W&B has started. How outboxes are written and read: see test_outbox.py.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sqlite3
import subprocess
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from backbone import ledger, page, process, values
from backbone import run as run_room
from backbone.host import catch_up
from backbone.inbox import GONE, HOME
from backbone.reading import Reader, Reading
from backbone.records import COMMIT, ENDED, EXIT, EXPECT, GOODBYE, LOST, REPORT, VANISHED
from backbone.reduction import Reduction
from backbone.relay import Relays
from backbone.state import Row
from backbone.transaction_log import TransactionLogs
from common import TrainingPipelineActor

import numpy as np
import pytest
import wandb
from conftest import folders, read_rows, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import ELSEWHERE, QUIET, Event, Kept, begun, report, who


@pytest.fixture
def kept(tmp_path) -> Iterator[Callable[..., Kept]]:
    """kept(workers=2): a run with one pipeline. One that is made again goes on as a restarted actor does."""
    made = []

    def kept(prefix: str = "", reduction: Reduction | None = None, workers: int = 1, **init) -> Kept:
        made.append(Kept(tmp_path, **init))
        made[-1].join(prefix, reduction, workers)
        return made[-1]

    yield kept
    for each in made:
        each.close()


def again(made: Kept) -> Kept:
    """As a restarted actor goes on."""
    made.close()
    return Kept(Path(made.init["dir"]))


def of(rows: list[Row], key: str = "a") -> list:
    return [row.metrics.get(key) for row in rows]


def steps(made: Kept) -> list[int]:
    return of(made.rows, "step")


def sizes(made: Kept) -> list[tuple[int, int]]:
    return [(row.metrics["step"], row.metrics["workers"]) for row in made.rows]


# Rows and their numbers


def test_rows_are_numbered_as_they_come_over_all_pipelines(kept):
    made = kept("training/")
    made.join("inference/")
    made.say(5, {"a": 1.0}, "training/")
    made.say(5, {"a": 2.0}, "inference/", worker="v")
    made.say(6, {"a": 3.0}, "training/")
    assert [row[:2] for row in made.rows] == [
        (0, {"training/a": 1.0, "training/step": 5, "training/workers": 1}),
        (1, {"inference/a": 2.0, "inference/step": 5, "inference/workers": 1}),
        (2, {"training/a": 3.0, "training/step": 6, "training/workers": 1}),
    ]


def test_numbers_begin_where_the_run_does(kept):
    made = kept()
    made.state.note(first=40)
    for step in range(2):
        made.say(step, {"a": 1.0})
    made.state.note(first=20)
    made.say(2, {"a": 1.0})
    assert [row.number for row in made.rows] == [40, 41, 42]


def test_the_order_of_the_reports_has_no_effect_on_the_row(kept):
    reports = [
        {"a": 0.1, "x": np.array([0.1, 7.0])},
        {"a": 0.7, "x": np.array([3.3])},
        {"a": 1e9, "x": np.array([1e-9])},
    ]
    made = kept(workers=3)
    for step, order in enumerate(itertools.permutations(enumerate(reports))):
        made.bring(*(report(f"w{i}", step, metrics) for i, metrics in order))
    assert len(made.rows) == 6
    assert len({tuple(sorted((k, v) for k, v in row.metrics.items() if k != "step")) for row in made.rows}) == 1


def test_a_step_may_be_reported_in_parts_by_several_processes_and_over_a_restart(kept):
    made = kept(reduction=Reduction(sums=("n",)), workers=2)
    made.say(0, {"n": 1}, worker="w", commit=False)
    made = again(made)
    made.say(0, {"n": 2}, worker="v")
    assert made.rows == []
    made.say(0, {"n": 4}, worker="w")
    assert of(made.rows, "n") == [7]


def test_a_row_s_time_is_when_the_last_of_its_reports_was_logged(kept):
    """Not when it was made: a step may wait for a straggler, and an actor that was dead may catch up."""
    made = kept(workers=2)
    made.bring(report("w", 0, {"a": 1.0}, at=1000.5), report("v", 0, {"a": 1.0}, at=1700.25))
    made.bring(report("w", 1, {"a": 1.0}, at=1800.0))
    made = again(made)
    made.bring(report("v", 1, {"a": 1.0}, at=1750.0))
    assert [row.wall_time for row in made.rows] == [1700.25, 1800.0]


def test_the_row_of_the_highest_step_is_the_progress_whatever_came_last(kept):
    made = kept()
    made.say(7, {"a": 7.0, "text": "x"})
    made.say(3, {"a": 3.0})
    assert made.run.pipeline("").last_row == {"a": 7.0, "step": 7, "workers": 1}
    made = again(made)
    made.say(4, {"a": 4.0})
    assert made.run.pipeline("").last_row["step"] == 7
    made.say(8, {"a": 8.0})
    assert made.run.pipeline("").last_row["step"] == 8


def test_a_straggler_s_report_gets_a_row_of_its_own(kept):
    made = kept(workers=2)
    made.bring(report("w", 0, {"a": 1.0}), report("v", 0, {"a": 3.0}))
    made.say(0, {"a": 9.0}, worker="late")
    made.end()
    assert of(made.rows) == [2, 9]
    assert made.run.pipeline("").counts == Counter(reports=3, rows=2, partial=1)
    assert made.in_no_row() == 0


def test_fewer_workers_make_steps_whole_that_wait(kept):
    made = kept(workers=2)
    for step in range(3):
        made.say(step, {"a": float(step)}, commit=False)
    assert made.rows == []
    made.expect(1)
    assert steps(made) == [0, 1]
    made.say(3, {"a": 3.0}, commit=False)
    assert steps(made) == [0, 1, 2]


# Totals and weights


def test_totals_add_up_over_steps_and_restarts(kept):
    made = kept("training/", TrainingPipelineActor.reduction, workers=2)
    for step in range(3):
        made.bring(*(report(f"w{i}", step, {"tokens": 10 * i}) for i in (1, 2)))
        made = again(made)
    assert of(made.rows, "training/tokens_total") == [30, 60, 90]
    made.close()


def test_a_total_leaves_out_what_is_no_number(kept):
    made = kept(reduction=Reduction(sums=("n",), totals=("n",)))
    for step, n in enumerate([1, math.nan, "x", math.inf, 2]):
        made.say(step, {"n": n})
    assert of(made.rows, "n_total") == [1, 1, None, 1, 3]
    assert math.isnan(made.rows[1].metrics["n"])  # but it stays visible in its own row


def test_totals_go_on_from_those_of_the_run_that_is_resumed(kept):
    made, rule = kept(), Reduction(totals=("n",))
    pipeline = made.run.pipeline("")
    pipeline.begin(rule, 1, {"totals": {"n": 100, "other": 5}}, {})
    made.say(0, {"n": 1})
    pipeline.begin(rule, 1, {"totals": {"n": 7}}, {"n_total": 8})  # a restart: what it counted itself is right
    made.say(1, {"n": 1})
    assert of(made.rows, "n_total") == [101, 102]
    assert pipeline.totals == {"n": 102}


def test_totals_of_a_server_are_those_of_the_pipeline_s_own_keys(kept):
    pipeline = kept("training/").run.pipeline("training/")
    summary = {
        "training/tokens_total": 5,
        "training/loss": 0.5,
        "inference/rollouts_total": 7,
        "tokens_total": 1,
        "training/n_total": math.nan,
        "training/text_total": "x",
    }
    pipeline.begin(Reduction(totals=("*",)), 1, {"totals": {"tokens": 3, "other": 1}}, summary)
    assert pipeline.totals == {"tokens": 5, "other": 1}


@pytest.mark.parametrize(("step", "total"), [(2, 9), (5, 3), (8, 3)], ids=["behind", "level", "ahead"])
@pytest.mark.parametrize("rows", [{"5": 1}, {}], ids=["with rows", "without"])
def test_whoever_is_ahead_of_server_and_folder_has_the_totals(kept, step, total, rows):
    pipeline = kept("").run.pipeline("")
    before = {"totals": {"n": 9}, "row_reports": rows, "first": 6}
    pipeline.begin(Reduction(totals=("n",)), 1, before, {"n_total": 3, "_step": step})
    assert pipeline.totals == {"n": total}


def test_a_missing_weight_is_warned_of_once_with_its_count(kept):
    made = kept(reduction=Reduction(weights={"loss": "tokens"}), workers=2)
    for step in range(3):
        for worker in "ab":
            made.say(step, {"loss": 1.0}, worker=worker)
    assert made.state.warnings == ["'loss' has the plain mean where its weight 'tokens' is no number (3 times)"]


def test_warnings_name_the_pipeline_and_are_told_once(kept):
    made, heard = kept("training/", workers=2), []
    made.state.hear = heard.append
    for step in range(3):
        made.bring(report("w", step, {"a": "x"}), report("v", step, {"a": "y"}))
    assert heard == ["training/: 'a' differs between workers: one of them is kept"]
    made = again(made)
    made.bring(report("w", 3, {"a": "x"}), report("v", 3, {"a": "y"}))
    assert made.state.warnings == ["training/: 'a' differs between workers: one of them is kept (4 times)"]


# Who logs


def test_one_process_s_tasks_are_workers_each_and_done_when_the_next_one_begins(kept):
    made = kept(workers=2)
    made.bring(who("p", "task 1"), report("p", 0, {"a": 1.0}, commit=False))
    made.bring(who("p", "task 2"), report("p", 0, {"a": 3.0}, commit=False))
    assert made.rows == []
    made.bring(who("p", "task 3"), report("p", 1, {"a": 5.0}, commit=False))
    assert (sizes(made), of(made.rows)) == ([(0, 2)], [2])


def test_a_task_that_says_goodbye_is_done_and_no_newcomer_is_taken_for_its_second_attempt(kept):
    made = kept(workers=2)
    made.bring(who("p", "task 1"), report("p", 0, {"a": 1.0}, commit=False), Event("p", GOODBYE))
    made.bring(Event("p", ENDED))  # its process is killed, which is no death of the task
    made.bring(who("q", "task 2"), report("q", 0, {"a": 3.0}, commit=False))
    assert made.rows == []
    made.bring(Event("q", GOODBYE))
    assert (sizes(made), of(made.rows)) == ([(0, 2)], [2])


def test_a_worker_that_is_given_a_label_is_the_same_worker(kept):
    made = kept(workers=2)
    made.bring(report("p", 0, {"a": 1.0}, commit=False), who("p", "p", "rank 3", task=""))
    made.bring(report("p", 0, {"a": 3.0}, commit=False), report("q", 0, {"a": 8.0}))
    assert made.rows == []
    assert [told for (told,) in made.state.db.execute("SELECT who FROM reports ORDER BY id")] == ["p", "rank 3", "q"]
    made.bring(report("p", 1, {"a": 1.0}))
    assert sizes(made) == [(0, 2)]


@pytest.mark.parametrize("ends", ["by itself", "by death"])
def test_a_process_that_ends_by_itself_has_not_died(kept, ends):
    """After a death who comes anew makes a second attempt, after an end it is one of the workers of the step."""
    made = kept(workers=3)
    made.bring(report("w", 0, {"a": 1.0}, commit=False), report("v", 0, {"a": 1.0}, commit=False))
    made.bring(*([Event("w", EXIT)] if ends == "by itself" else []), Event("w", ENDED))
    made = again(made)
    made.bring(report("successor", 0, {"a": 9.0}, commit=False))
    assert sizes(made) == ([] if ends == "by itself" else [(0, 2)])
    made.end()
    assert sizes(made) == ([(0, 3)] if ends == "by itself" else [(0, 2), (0, 1)])


def test_attempts_of_a_worker_share_no_row_whoever_else_is_at_work(kept):
    """A task's retry, an actor's restart, and one that is killed while another one takes its place."""
    made = kept(workers=2)
    made.bring(who("p", "task x 0"), report("p", 0, {"a": 1.0}, commit=False), Event("p", ENDED))
    made.bring(who("q", "task x 1"), report("q", 0, {"a": 2.0}, commit=False), Event("q", GOODBYE))
    made.bring(report("actor", 1, {"a": 4.0}, commit=False), report("other", 1, {"a": 4.0}))
    made.bring(Event("actor", ENDED), report("actor's second life", 1, {"a": 8.0}))
    made.end()
    assert [(row.metrics["step"], row.metrics["a"]) for row in made.rows] == [(0, 1.0), (1, 4.0), (0, 2.0), (1, 8.0)]


def test_a_child_process_is_counted_as_its_parent(kept):
    made = kept(workers=2)
    made.bring(begun("loader", parent="w"), report("loader", 0, {"a": 1.0}), report("w", 0, {"a": 3.0}))
    assert made.rows == []
    made = again(made)
    made.bring(Event("loader", ENDED), report("v", 0, {"a": 5.0}))
    assert sizes(made) == [(0, 2)]
    assert of(made.rows) == [3]  # the mean of three


def lost(**counts: int) -> bytes:
    """A page's counters; pipeline0=3."""
    return b"".join(counts.get(f"pipeline{i}", 0).to_bytes(8, "little") for i in range(page.OTHER + 1))


def test_reports_that_a_process_had_no_room_for_are_counted_once(kept):
    made = kept("training/")
    made.join("inference/")
    made.say(0, {"a": 1.0}, "training/")
    made.bring(Event("w", LOST, lost(pipeline0=3)))
    made = again(made)
    made.bring(Event("w", LOST, lost(pipeline0=5, pipeline1=1)), Event("v", LOST, lost(pipeline1=2)))
    counts = {prefix: made.run.pipeline(prefix).counts["reports"] for prefix in ("training/", "inference/")}
    assert counts == {"training/": 1 + 5, "inference/": 1 + 2}
    assert (made.in_no_row("training/"), made.in_no_row("inference/")) == (5, 3)


def test_what_else_a_process_had_no_room_for_is_no_report_and_is_named_once(kept):
    made = kept()
    made.say(0, {"a": 1.0})
    for n in (1, 7):
        made.bring(Event("w", LOST, lost(**{f"pipeline{page.OTHER}": n})))
        made = again(made)
    account = ledger.account(made.state, made.run.pipeline(""))
    assert (account.reports, made.in_no_row(), account.ok) == (1, 0, False)
    assert account.unheard == ["w: there was no room for alerts, config, log lines or the like"]


def test_an_outbox_that_somebody_removed_is_named_and_its_worker_has_ended(kept):
    made = kept(workers=2)
    made.bring(report("w", 0, {"a": 1.0}, commit=False), report("v", 0, {"a": 3.0}))
    made.bring(Event("w", VANISHED))
    assert sizes(made) == [(0, 2)]
    account = ledger.account(made.state, made.run.pipeline(""))
    assert (account.unheard, account.ok) == (
        ["w: somebody has removed its outbox, or there was no room for one"],
        False,
    )
    assert account.warnings == [f"reports may be missing of {account.unheard[0]}"]


def test_on_a_node_that_is_gone_all_have_died(kept):
    made = kept(workers=2)
    made.bring(report("w", 0, {"a": 1.0}, commit=False), report("v", 0, {"a": 3.0}, commit=False))
    made.bring(report("elsewhere", 1, {"a": 1.0}), node="another")
    assert made.inbox.places == {ELSEWHERE, "another"}
    made.inbox.place_is_gone(ELSEWHERE, "it is dead")
    assert made.inbox.places == {"another"}
    made.bring(report("successor", 0, {"a": 5.0}), node="another")
    assert sizes(made) == [(0, 2)]
    made = again(made)
    assert (made.inbox.places, made.inbox.positions(ELSEWHERE)) == ({"another"}, {})
    account = ledger.account(made.state, made.run.pipeline(""))
    assert (account.unheard, account.ok) == ([f"node {ELSEWHERE}: it is dead"], False)


def test_a_place_is_known_before_anything_has_come_from_there_and_when_all_who_logged_there_have_ended(kept):
    made = kept()
    made.inbox.know(["another"])
    made.bring(report("w", 0, {"a": 1.0}), Event("w", ENDED))
    made.bring(report("v", 1, {"a": 1.0}), Event("v", ENDED))
    made = again(made)
    assert made.inbox.places == {ELSEWHERE, "another"}
    made.run.read([(ELSEWHERE, Reading([], has_left=True)), ("another", Reading([], is_last=True))])
    assert again(made).inbox.places == set()


# The owner's end


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ([Event("owner", EXIT, pickle.dumps((3, "ValueError: x")))], (3, "ValueError: x")),
        ([Event("owner", EXIT, pickle.dumps((0, None))), Event("owner", ENDED)], (0, None)),
        ([Event("owner", EXIT), Event("owner", ENDED)], (0, None)),  # a worker of Ray's that ends by itself
        ([Event("owner", ENDED)], GONE),
        ([Event("owner", EXIT)], None),  # it has not ended yet
        ([Event("owner", GOODBYE)], None),
        ([Event("w", EXIT, pickle.dumps((3, "x"))), Event("w", ENDED)], None),
    ],
    ids=["says how", "says how and ends", "says nothing and ends", "is killed", "is about to end", "logs no more", "w"],
)
def test_a_run_ends_with_its_owner_as_that_has_said_also_after_a_restart(kept, said, end):
    made = kept()
    made.say(0, {"a": 1.0}, worker="owner")
    made.bring(*said)
    assert made.state.facts.get("owner_end") == end
    made = again(made)
    assert made.state.facts.get("owner_end") == end


# Reports that can't be used


class Unknown:
    """As an object of a class that the pipeline actor can't import."""

    def __reduce__(self):
        return os.path.join, ()  # which raises


def unreadable(process: str, step: int) -> Event:
    return Event(process, COMMIT, values.pack({"a": 1.0, "x": Unknown()}), step)


def test_a_report_that_can_not_be_unpickled_is_lost_alone_with_the_reason(kept):
    made = kept(workers=2)
    made.bring(unreadable("w", 0), report("v", 0, {"a": 3.0}))
    made.bring(report("w", 1, {"a": 5.0}), report("v", 1, {"a": 7.0}))
    assert of(made.rows) == [3, 6]
    assert (made.run.pipeline("").counts["reports"], made.in_no_row()) == (4, 1)
    [warning] = made.state.warnings
    assert warning.startswith("the pipeline actor can't read a report: join() missing 1 required")


def test_a_step_of_which_nothing_can_be_unpickled_has_no_row(kept):
    made = kept()
    made.bring(unreadable("w", 0), report("w", 1, {"a": 1.0}))
    assert steps(made) == [1]
    assert made.run.pipeline("").counts == Counter(reports=2, rows=1, partial=0)
    assert made.in_no_row() == 1


class Incomparable(wandb.Html):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("incomparable")

    __hash__ = None


def test_values_that_can_not_be_reduced_are_lost_values_and_their_row_stays(kept):
    made = kept(workers=2)
    made.bring(*(report(f"w{text}", 0, {"a": 1.0, "page": Incomparable(text)}) for text in "xy"))
    [row] = made.rows
    assert row.metrics == {"a": 1.0, "step": 0, "workers": 2}
    account = ledger.account(made.state, made.run.pipeline(""))
    assert (account.rows, made.in_no_row(), account.lost_values, account.ok) == (1, 0, 1, False)


class Once(wandb.Html):
    """Can be sent, and read there, but not be sent again."""

    def __reduce__(self) -> tuple:
        assert not vars(self).get("arrived")
        return Once._arrived, ()

    @staticmethod
    def _arrived() -> "Once":
        value = Once.__new__(Once)
        value.arrived = True
        return value


def test_a_value_that_can_not_be_kept_is_a_lost_value_and_its_row_stays(kept):
    made = kept()
    for step, metrics in enumerate([{"page": Once("x"), "a": 1.0}, {"page": Once("x")}]):
        made.bring(Event("w", COMMIT, pickle.dumps(metrics), step))
    numbers = {"workers": 1}
    assert [row.metrics for row in made.rows] == [{"a": 1.0, "step": 0} | numbers, {"step": 1} | numbers]
    account = ledger.account(made.state, made.run.pipeline(""))
    assert (made.in_no_row(), account.lost_values, account.ok) == (0, 2, False)
    [warning] = made.state.warnings
    assert warning.startswith("metric 'page' can't be sent: ")
    assert warning.endswith(" (2 times)")


def test_whether_a_row_is_partial_is_decided_when_its_step_is_over(kept):
    made = kept()
    made.bring(*(report("w", step, {"a": 1.0}) for step in range(3)), Event("w", EXPECT, step=2))
    assert made.run.pipeline("").counts["partial"] == 0
    made.bring(report("w", 3, {"a": 1.0}), Event("w", EXPECT, step=1))
    assert made.run.pipeline("").counts == Counter(rows=4, reports=4, partial=0)


def test_a_key_that_is_logged_and_summed_up_as_well_is_warned_of(kept):
    made = kept(reduction=Reduction(totals=("n",)))
    made.say(0, {"n": 5, "n_total": 1000})
    assert of(made.rows, "n_total") == [5]
    assert made.state.warnings == ["'n_total' is logged, and a running sum as well: the sum is kept"]


def test_a_row_that_is_too_large_for_the_state_loses_its_largest_values_only(kept, monkeypatch):
    monkeypatch.setattr("backbone.records.LARGEST", 6 << 20)
    made = kept("t/")
    texts = {name: name * (size << 20) for name, size in {"x": 3, "y": 4, "z": 2}.items()}
    made.say(0, {"a": 1.0, **texts}, "t/")
    made.say(1, {"a": 2.0, "x": texts["x"]}, "t/")
    assert [sorted(row.metrics) for row in made.rows] == [
        ["t/a", "t/step", "t/workers", "t/x", "t/z"],
        ["t/a", "t/step", "t/workers", "t/x"],
    ]
    account = ledger.account(made.state, made.run.pipeline("t/"))
    assert (account.lost_values, account.ok, made.in_no_row("t/")) == (1, False, 0)
    assert account.warnings == ["t/: a row has 9 MB, so 't/y', its largest value, is left out"]


# Restarts


CALLS = st.one_of(
    *[st.tuples(st.just("say"), st.sampled_from("uvw"), st.integers(0, 3), st.booleans())] * 4,
    st.tuples(st.just("ends"), st.sampled_from("uvw"), st.booleans()),
    st.tuples(st.just("task"), st.sampled_from("uv"), st.integers(0, 9)),
    st.tuples(st.just("expect"), st.integers(1, 3)),
)


def readings_of(calls: list[tuple]) -> Iterator[list[Event] | int]:
    """What is brought, or expected. A process that has ended is followed by another one."""
    lives = Counter()
    for number, (kind, *what) in enumerate(calls):
        name = f"{what[0]}{lives[what[0]]}"
        match kind, *what:
            case "say", _, step, commit:
                metrics = {"n": number, "x": np.array([float(number)])}
                yield [report(name, step, metrics, commit, at=float(number))]
            case "ends", worker, died:
                lives[worker] += 1
                yield [*([] if died else [Event(name, EXIT)]), Event(name, ENDED)]
            case "task", _, task:
                yield [who(name, f"task {task}")]
            case "expect", workers:
                yield [Event("w", EXPECT, step=workers)]


@settings(max_examples=60)
@given(st.integers(1, 3), st.lists(CALLS, min_size=1, max_size=25), st.data())
def test_a_state_that_is_opened_again_goes_on_as_if_nothing_had_happened(workers, calls, data):
    restarts = data.draw(st.sets(st.integers(0, len(calls) - 1)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        straight, broken = Kept(Path(one)), Kept(Path(two))
        for made in (straight, broken):
            made.join("", Reduction(sums=("n",), totals=("n",)), workers)
        for number, reading in enumerate(readings_of(calls)):
            if number in restarts:
                broken = again(broken)
            for made in (straight, broken):
                made.bring(*reading)
            assert broken.rows == straight.rows
        for made in (straight, broken):
            made.end()
        assert broken.rows == straight.rows
        mine, other = broken.run.pipeline(""), straight.run.pipeline("")
        assert (mine.counts, mine.last_row, mine.totals) == (other.counts, other.last_row, other.totals)
        assert broken.state.warnings == straight.state.warnings
        assert mine.counts["reports"] == sum(event[0] == "say" for event in calls)
        assert broken.in_no_row() == 0
        for made in (straight, broken):
            made.close()


def test_at_the_end_all_is_read_as_long_as_there_is_something_however_long_that_takes(kept, monkeypatch):
    monkeypatch.setattr(Reader, "LIMIT", 1)
    made = kept()
    worker = Logging(made)
    for step in range(200):
        worker.log(step, {"text": "x" * 5_000})
    relays = Relays(made.address, made.inbox.positions, made.inbox.place_is_gone)
    began = time.monotonic()
    deadline = catch_up(made.run, relays, lambda look: made.run.read((), look), began + 0.05, closing=True)
    assert deadline > began + 0.5  # so long it has taken
    assert made.run.pipeline("").counts["reports"] == 200
    assert "unheard" not in made.state.facts
    worker.end()


def test_rows_stay_in_the_state_and_those_that_wandb_lacks_are_found(kept):
    made = kept()
    for step in range(6):
        made.say(step, {"a": float(step)})
    made = again(made)
    there = {0, 1, 4}
    missing = list(made.state.missing(there.__contains__, max(there)))
    assert [(row.number, row.metrics["a"]) for row in missing] == [(5, 5.0), (6, 2.0), (7, 3.0)]
    made.say(6, {"a": 6.0})
    assert made.rows[-1].number == 8
    assert list(made.state.missing(lambda number: True, 8)) == []


FORK = multiprocessing.get_context("fork")


class Logging:
    """A process on the run's node that logs as far as it is told."""

    def __init__(self, made: Kept):
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._go, args=(made, theirs), daemon=True)
        self.process.start()

    def _go(self, made: Kept, pipe) -> None:
        box = process.outbox(made.address)
        while (told := pipe.recv()) is not None:
            box.put(REPORT, 0, *told)
            pipe.send(box.process.name)
        os._exit(0)

    def log(self, step: int, metrics: dict) -> str:
        """Returns when that is in the outbox: the process's name."""
        self._pipe.send((step, values.pack(values.as_report(metrics, step))))
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send(None)
        self.process.join()


def read_until(made: Kept, condition: Callable[[], object]) -> None:
    wait_for(lambda: (made.run.read(look=True), condition())[1], every=0.01)


@pytest.mark.parametrize("deaths", [0, 1, 2], ids=["after its files are removed", "before that", "twice before that"])
def test_an_actor_that_dies_when_it_has_read_an_outbox_to_its_end_reads_no_report_again(kept, monkeypatch, deaths):
    """What is committed is in the state alone for a moment; the files still say how far the last reading went."""
    made = kept()
    worker = Logging(made)
    for step in range(3):
        worker.log(step, {"a": float(step)})
    worker.end()
    for _ in range(max(1, deaths)):
        with monkeypatch.context() as patch:
            if deaths:
                patch.setattr(Reader, "acknowledge", lambda *_: None)
            made.run.read(look=True)
        assert steps(made) == [0, 1, 2]
        made = again(made)
    assert len([*made.address.folder.rglob("*.page")]) == bool(deaths)
    read_until(made, lambda: not made.inbox.positions(HOME))
    assert [*made.address.folder.rglob("*.page")] == []
    assert made.run.pipeline("").counts["reports"] == 3
    assert "unheard" not in made.state.facts


PARTS = 3  # of a step


def log_on(made: Kept, steps: int, number: int) -> None:
    """A process that logs each step in some parts, and now and then forks one that logs a little and is killed.

    Each report has a key of its own.
    """
    chance, me = random.Random(number), os.getpid()

    def log(pipeline: int, name: str, step: int) -> None:
        for part in range(PARTS):
            metrics = {f"said/{name}/{step}/{part}": 1}
            process.outbox(made.address).put(REPORT, pipeline, step, values.pack(metrics))

    for step in range(steps):
        log(number, f"worker{number}", step)
        time.sleep(chance.choice([0, 0.005, 0.01]))
        if step % 10 == 0 and not os.fork():
            for i in range(3):
                log(2, f"child{number}-{step}", i)
            os.kill(os.getpid(), signal.SIGKILL)
    while me == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
            continue
        os._exit(0)


def read_on(folder: Path) -> None:
    """As a pipeline actor does."""
    made = Kept(folder)
    while True:
        made.run.read()
        time.sleep(0.002)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_an_actor_that_is_killed_at_any_moment_reads_each_report_into_one_row_in_order(tmp_path, seed):
    """Each worker has a pipeline of its own, and their children, whose outboxes come and go, a third one."""
    chance, made, steps = random.Random(seed), Kept(tmp_path), 200
    for prefix in ("0/", "1/", "children/"):
        made.join(prefix, Reduction(sums=("said/*",)))
    made.close()
    workers = [FORK.Process(target=log_on, args=(made, steps, i), daemon=False) for i in range(2)]
    for worker in workers:
        worker.start()
    lives = 0
    while any(worker.is_alive() for worker in workers) or lives < 10:
        reader = FORK.Process(target=read_on, args=(tmp_path,))
        reader.start()
        time.sleep(chance.uniform(0.02, 0.2))
        reader.kill()
        reader.join()
        lives += 1
    made = Kept(tmp_path)
    made.end()
    found = Counter()
    for row in made.rows:
        found.update({key: count for key, count in row.metrics.items() if "said/" in key})
    children = {f"child{worker}-{step}/{i}/{part}" for worker in (0, 1) for step in range(0, steps, 10)
                for i in range(3) for part in range(PARTS)}  # fmt: skip
    assert {key for key in found if key.startswith("children/")} == {f"children/said/{name}" for name in children}
    for worker in ("0", "1"):
        mine = [row.metrics for row in made.rows if f"{worker}/step" in row.metrics]
        assert [row[f"{worker}/step"] for row in mine] == list(range(steps))
        assert {sum("said/" in key for key in row) for row in mine} == {PARTS}
    assert {*found.values()} == {1}
    assert len(found) == len(children) + 2 * steps * PARTS
    assert sum(pipeline.counts["reports"] for pipeline in made.run.pipelines) == len(found)
    assert "unheard" not in made.state.facts
    made.close()


# A full disk


@contextlib.contextmanager
def no_pages(made: Kept) -> Iterator[None]:
    """SQLite may not make its file longer."""
    made.state.db.execute("PRAGMA max_page_count = 1")  # or what there is
    try:
        yield
    finally:
        made.state.db.execute("PRAGMA max_page_count = 1073741823")


@contextlib.contextmanager
def no_longer_files(made: Kept) -> Iterator[None]:
    """The kernel lets this process make no file longer."""
    path = made.state.path
    longest, (soft, hard) = path.with_name(path.name + "-wal"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_space(made: Kept) -> Iterator[None]:
    """The disk is full."""
    filler = made.state.path.with_name("filler")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


def ways(way) -> str:
    return way.__name__


@pytest.fixture(params=[no_pages, no_longer_files, no_space], ids=ways)
def full(request, tmp_path) -> Iterator[Callable]:
    if request.param is not no_space:
        yield request.param
        return
    (tmp_path / "wandb").mkdir()  # where the state is; the outboxes are elsewhere, as they are with users
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path / "wandb"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk; the other two ways to fill it are tested")
    yield request.param
    subprocess.run(["umount", "--lazy", tmp_path / "wandb"], check=True)


BIG = "x" * 1_000_000


def test_while_the_disk_is_full_nothing_new_is_read_and_nothing_is_lost(kept, full):
    made = kept()
    worker = Logging(made)
    worker.log(0, {"a": 0.0})
    read_until(made, lambda: made.inbox.positions(HOME))
    with full(made):
        worker.log(1, {"a": 1.0, "text": BIG})
        with pytest.raises(sqlite3.Error):
            made.run.read()
        clock, queue = made.inbox.clock, len(made.state._queue)
        worker.log(2, {"a": 2.0, "text": BIG})
        for _ in range(5):
            time.sleep(0.01)
            with pytest.raises(sqlite3.Error):
                made.run.read()
        assert made.run.pipeline("").counts["reports"] == 2
        assert made.inbox.clock == clock  # what could come meanwhile is unread
        assert len(made.state._queue) == queue  # it is as large as what waits, however often that has failed
    made.run.read()
    assert (steps(made), made.run.pipeline("").counts["reports"]) == ([0], 2)
    made.run.read()
    worker.log(3, {"a": 3.0})
    made.run.read()
    assert steps(made) == [0, 1, 2]
    worker.end()
    made.end()
    assert (steps(made), made.in_no_row()) == ([0, 1, 2, 3], 0)


def test_a_disk_that_gets_full_when_the_rows_are_with_w_b_is_no_fault(kept, monkeypatch):
    made = kept()
    made.state.note(mode="disabled")  # in which something is noted behind the rows
    worker = Logging(made)
    worker.log(0, {"a": 0.0})
    worker.end()
    commit, results = made.state.commit, iter([None, sqlite3.OperationalError("database or disk is full")])

    def commit_or_raise() -> None:
        if made.state.is_pending and (error := next(results, None)):
            raise error
        commit()

    monkeypatch.setattr(made.state, "commit", commit_or_raise)
    for _ in range(3):
        with contextlib.suppress(sqlite3.Error):
            made.run.read(look=True)
    assert next(results, None) is None
    assert (made.run.pipeline("").counts["reports"], made.in_no_row(), made.state.waiting()) == (1, 0, [])


# What SQLite has freed, it can use again: the other two ways are needed where the disk takes nothing at all.
by_the_kernel = pytest.mark.parametrize("full", [no_longer_files, no_space], indirect=True, ids=ways)


@by_the_kernel
def test_an_actor_that_dies_while_the_disk_is_full_is_followed_by_one_that_reads_the_same(kept, full):
    made = kept()
    worker = Logging(made)
    worker.log(0, {"a": 0.0})
    read_until(made, lambda: made.inbox.positions(HOME))
    with full(made):
        worker.log(1, {"a": 1.0, "text": BIG})
        worker.log(2, {"a": 2.0, "text": BIG})
        with pytest.raises(sqlite3.Error):
            made.run.read()
        made.close()
    worker.end()
    made = kept()
    made.end()
    assert (steps(made), made.in_no_row()) == ([0, 1, 2], 0)
    assert made.run.pipeline("").counts == Counter(reports=3, rows=3, partial=0)


def test_what_relays_bring_while_the_disk_is_full_waits_as_well(kept, full):
    made = kept()
    made.say(0, {"a": 0.0})
    with full(made):
        for step in (1, 2):
            with pytest.raises(sqlite3.Error):
                made.say(step, {"a": float(step), "text": BIG})
    done = made.run.read()
    assert [node for node, _ in done] == [HOME, ELSEWHERE, ELSEWHERE]
    assert made.run.read() == [(HOME, Reading([]))]
    assert (steps(made), made.in_no_row()) == ([0, 1, 2], 0)


@by_the_kernel
def test_what_is_reported_and_reduced_while_the_disk_is_full_leaves_no_report_behind(kept, full):
    made = kept(workers=2)
    made.say(0, {"a": 0.0}, worker="v")
    with full(made):
        with pytest.raises(sqlite3.Error):
            made.say(0, {"a": 2.0, "text": BIG}, worker="w", commit=False)
        with pytest.raises(sqlite3.Error):
            made.expect(1)
        with pytest.raises(sqlite3.Error):
            made.say(1, {"a": 1.0}, worker="w")
    made.run.read()
    assert of(made.rows) == [1, 1]
    assert made.state.db.execute("SELECT count(*) FROM reports").fetchone() == (0,)


@by_the_kernel
def test_a_disk_that_is_full_at_the_end_loses_what_it_has_no_room_for(kept, full):
    made = kept(workers=2)
    made.say(0, {"a": 0.0, "text": BIG})
    with full(made):
        made.end(patience=0)
        assert (made.run.pipeline("").counts["reports"], made.in_no_row()) == (1, 1)
        assert made.state.warnings[-1].endswith("what could not be written is lost")


def test_facts_and_warnings_need_no_disk(kept, full):
    made = kept()
    with full(made):
        made.state.note(name="n", text=BIG)
        made.state.warn("kind", "a warning")
        with pytest.raises(sqlite3.Error):
            made.state.commit()
        assert (made.state.facts["name"], made.state.warnings) == ("n", ["a warning"])
    made.state.commit()  # there is room again
    made = again(made)
    assert (made.state.facts["name"], made.state.warnings) == ("n", ["a warning"])


def test_a_commit_that_fails_leaves_nothing_behind_and_is_made_up_for(kept):
    made = kept()
    made.state.note(known=1)
    made.state.add_row(0, 1, {"a": 1.0}, values.pack({"a": 1.0}), 0.0)
    made.state.add_row(0, 1, {"a": BIG}, values.pack({"a": BIG}), 0.0)
    with pytest.raises(sqlite3.Error), no_pages(made):
        made.state.commit()
    assert made.rows == []
    assert made.state.db.execute("SELECT count(*) FROM facts WHERE name = 'known'").fetchone() == (0,)
    made.state.commit()
    made.state.commit()
    made = again(made)
    assert (made.state.facts["known"], of(made.rows)) == (1, [1.0, BIG])


def test_a_commit_that_is_interrupted_leaves_nothing_behind(kept):
    made = kept()
    made.state.note(known=1)
    made.state.do("an interrupt")  # here a statement that fails, and that SQLite takes nothing back for
    with pytest.raises(sqlite3.Error):
        made.state.commit()
    made = again(made)
    assert "known" not in made.state.facts


# The clock


@pytest.fixture
def passes(monkeypatch) -> Callable[[float], None]:
    """passes(seconds): so many seconds go by, for whoever reads."""
    now = [time.monotonic()]
    monkeypatch.setattr(run_room, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_the_clock_counts_the_time_between_readings_and_a_second_of_each_at_most(kept, passes, monkeypatch):
    """The process may have been stopped, or the machine asleep, while workers had much to say."""
    made = kept()
    made.run.read()
    before = made.inbox.clock

    def counted() -> float:
        made.run.read()
        return round(made.inbox.clock - before, 6)

    for seconds, count in [(0.25, 0.25), (0.5, 0.75), (3600.0, 1.75), (0.0, 1.75)]:
        passes(seconds)
        assert counted() == count
    with monkeypatch.context() as patch:  # a reading that takes long
        patch.setattr(made.run.reader, "read", lambda look: passes(100) or Reading([]))
        assert counted() == 1.75
    assert counted() == 1.75


def test_the_clock_stands_still_while_a_node_does_not_answer(kept, passes):
    made = kept()
    made.run.read()
    before, made.run.paused = made.inbox.clock, True
    for _ in range(100):
        passes(0.5)
        made.run.read()
    made.run.paused = False
    made.run.read()
    assert made.inbox.clock == before
    passes(0.5)
    made.run.read()
    assert made.inbox.clock == before + 0.5


@pytest.mark.parametrize("how", ["goes on", "restarts", "paused", "unread"])
def test_a_row_whose_worker_hangs_comes_by_the_clock_and_not_while_that_worker_may_have_been_missed(kept, passes, how):
    made = kept(workers=2)
    made.bring(report("w", 0, {"a": 1.0}), report("v", 0, {"a": 1.0}), report("w", 1, {"a": 2.0}))
    made.run.paused = how == "paused"
    for second in range(100):
        passes(1)
        made.run.read([(ELSEWHERE, Reading([], is_cut=how == "unread"))])
        if second % 10 == 5 and how == "restarts":
            made = again(made)
            made.run._read_at = run_room.time.monotonic()
    assert sizes(made) == [(0, 2)] + [(1, 1)] * (how in ("goes on", "restarts"))
    assert [*made.state.facts.get("warnings", {})] == ["few workers"] * (how in ("goes on", "restarts"))


# What W&B has


def looked(made: Kept) -> bool:
    """Reads a second later, which is how often it is looked for what W&B has."""
    made.inbox.clock += 1
    return bool(made.run.read())


def test_the_content_of_rows_goes_when_w_b_has_it(opened, tmp_path):
    """So the state of a run stays as small as what has not arrived yet: here of 60 rows of 1 MB."""
    made = opened(settings=QUIET | dict(x_transaction_log_flush_interval=0.05))
    made.join()
    largest = 0
    for step in range(60):
        made.say(step, {"a": float(step), "text": f"{step:09}" + BIG})
        if step % 10 == 9:
            wait_for(lambda: looked(made) and not made.rows, every=0.02)
        largest = max(largest, sum(path.stat().st_size for path in made.state.path.parent.glob(".run.state*")))
    assert largest < 40 * len(BIG)
    account = made.finish()[""]
    assert (account.rows, account.lost) == (60, 0)
    assert [row["a"] for path in folders(tmp_path) for row in read_rows(path)] == list(range(60))
    tracemalloc.start()
    assert TransactionLogs(folders(tmp_path)).numbers == {*range(60)}
    _, peak = tracemalloc.get_traced_memory()  # nobody needs a log as a whole
    tracemalloc.stop()
    assert peak < 20 * len(BIG)


def test_w_b_s_time_of_a_row_is_when_the_last_of_its_reports_was_logged(opened, tmp_path):
    made = opened()
    made.join(workers=2)
    for step, times in enumerate([(1000.5, 900.0), (1001.0, 2000.25)]):
        made.bring(*(report(worker, step, {"a": 1.0}, at=at) for worker, at in zip("vw", times, strict=True)))
    made.finish()
    assert [row["_timestamp"] for row in read_rows(folders(tmp_path)[0])] == [1000.5, 2000.25]


def test_a_state_that_is_lost_is_made_anew_and_the_account_says_so(opened, tmp_path):
    """With the pipelines that the run has, and from where the outboxes have been read to."""
    made = opened()
    made.join("a/", Reduction(sums=("n",)), workers=2)
    made.join("b/")
    worker = Logging(made)
    for step in range(3):
        worker.log(step, {"x": step})
        made.say(step, {"n": 1}, "b/")
    read_until(made, lambda: made.inbox.positions(HOME))
    worker.log(3, {"x": 3})
    made.abandon()
    made.state.remove()
    made = opened()
    assert [(each.prefix, each.reduction.sums, each.steps.workers) for each in made.run.pipelines] == [
        ("a/", ("n",), 2), ("b/", (), 1),
    ]  # fmt: skip
    worker.end()
    made.say(3, {"n": 1}, "b/")
    accounts = made.finish()
    assert [account.unheard for account in accounts.values()] == [["the time before the run's state was lost"]] * 2
    assert not any(account.ok or account.lost for account in accounts.values())
    assert "reports may be missing of the time before the run's state was lost" in accounts["a/"].warnings
    rows = [row for path in folders(tmp_path) for row in read_rows(path)]
    assert [row["_step"] for row in rows] == list(range(5))
    assert [row["b/step"] for row in rows if "b/step" in row] == [0, 1, 2, 3]
    assert [row["a/x"] for row in rows if "a/step" in row] == [3]  # what the lost state had is gone


def test_an_earlier_life_of_the_id_that_was_not_finished_is_finished_first(opened, tmp_path):
    made = opened(life="one")
    made.join(workers=2)
    worker = Logging(made)
    made.say(0, {"a": 0.0})
    worker.log(0, {"a": 2.0})
    read_until(made, lambda: made.inbox.positions(HOME))
    worker.log(1, {"a": 1.0})  # which nobody has read
    worker.end()
    made.bring(Event("owner", EXIT, pickle.dumps((0, None))))
    made.abandon()
    made = opened(life="two")
    assert made.state.facts.get("owner_end") is None
    assert not (tmp_path / "private-one").exists()
    made.join()
    made.say(5, {"a": 5.0})
    account = made.finish()[""]
    assert account.lost == 0
    rows = [row for path in folders(tmp_path) for row in read_rows(path)]
    assert [(row["_step"], row["step"], row["a"], row["workers"]) for row in rows] == [
        (0, 0, 1, 2), (1, 1, 1, 1), (2, 5, 5, 1),
    ]  # fmt: skip


def test_a_start_that_fails_gives_back_all_that_is_known_of_the_earlier_life(opened):
    made = opened(life="first")
    made.join()
    made.say(0, {"a": 1.0})
    made.tell("config", later=5)
    made.state.note(end=(3, "why"))
    made.state.commit()
    made.abandon()
    with pytest.raises(Exception, match="no_such_setting"):
        opened(life="second", settings=QUIET | {"no_such_setting": 1})
    again = opened(life="first")
    assert again.address == again.state.facts["address"]
    assert (again.state.facts["config"], again.state.facts["end"]) == ({"later": 5}, (3, "why"))
    assert again.finish()[""].lost == 0


def test_with_resume_never_totals_begin_anew(opened):
    for life in range(2):
        made = opened(life=str(life), **{"resume": "never"} if life else {})
        made.join("", Reduction(totals=("n",)))
        made.say(0, {"n": 1})
        assert made.run.pipeline("").totals == {"n": 1}
        made.finish()
        made.close()


def test_an_earlier_life_that_is_finished_leaves_nothing_to_the_next(opened):
    made = opened(life="one")
    made.join()
    made.say(0, {"a": 0.0})
    made.finish(1, "x")
    made.close()
    made = opened(life="two")
    assert (made.run.pipelines, made.state.warnings) == ([], [])
    made.join()
    made.say(0, {"a": 0.0})
    account = made.finish()[""]
    assert (account.reports, account.rows, account.lost, account.restarts) == (1, 1, 0, 0)
