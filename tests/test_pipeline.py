"""A pipeline and its store, without Ray and wandb: what comes in gets into rows once and in order, whatever fails."""

import contextlib
import itertools
import math
import os
import resource
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from backbone.pipeline import Pipeline
from backbone.reduction import Reduction
from backbone.run import ledger
from backbone.values import pack
from common import TrainingPipelineActor

import numpy as np
import pytest
import wandb
from backbone.inbox import Batch
from backbone.store import Row, Store
from hypothesis import given, settings
from hypothesis import strategies as st

NODE = "node"


class Opened:
    """A pipeline of a store, which can be closed and opened again as by a restarted actor."""

    def __init__(self, folder: Path, reduction: Reduction | None = None, workers: int = 1, prefix: str = ""):
        self.path, self.prefix, self.serials = folder / ".run.store", prefix, itertools.count()
        self.store = Store(self.path)
        self.pipeline = Pipeline(self.store, prefix, reduction or Reduction())
        self.pipeline.begin(reduction or Reduction(), workers, {})

    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.path)
        self.pipeline = Pipeline.all(self.store)[self.prefix]

    def push(self, *items: tuple, sender: str = "a", serial: int | None = None, **fields) -> list[Row]:
        """A batch of (worker, step, metrics), of which the last of a worker may be (worker, None): it is gone."""
        serial = next(self.serials) if serial is None else serial
        packed = [(w, step, bool(commit), pack(metrics[0]) if metrics else b"") for w, step, *metrics, commit in items]
        fields = dict(oldest=serial, said=0, last=False) | fields
        return self.pipeline.push(Batch(self.prefix, sender, (NODE, 7), serial, items=packed, **fields))

    def ledger(self):
        return ledger(self.store, self.pipeline, lambda number: True)


@pytest.fixture
def opened(tmp_path):
    made = []

    def opened(*arguments, **options) -> Opened:
        made.append(Opened(tmp_path, *arguments, **options))
        return made[-1]

    yield opened
    for each in made:
        each.store.close()


def values(rows: list[Row], key: str = "a") -> list:
    return [row.metrics.get(key) for row in rows]


# Rows and their numbers


def test_rows_are_numbered_as_they_come_over_all_pipelines(opened):
    made = opened(prefix="training/")
    other = Pipeline(made.store, "inference/", Reduction())
    other.begin(Reduction(), 1, {})
    rows = made.push(("w", 5, {"a": 1.0}, True))
    rows += other.push(Batch("inference/", "b", (NODE, 7), 0, 0, 1, False, [("v", 5, True, pack({"a": 2.0}))]))
    rows += made.push(("w", 6, {"a": 3.0}, True))
    assert rows == [
        (0, {"training/a": 1.0, "training/step": 5, "training/workers": 1}),
        (1, {"inference/a": 2.0, "inference/step": 5, "inference/workers": 1}),
        (2, {"training/a": 3.0, "training/step": 6, "training/workers": 1}),
    ]


def test_numbers_begin_where_the_run_does(opened):
    made = opened()
    made.store.note(first=40)
    assert [row.number for row in made.push(("w", 0, {"a": 1.0}, True), ("w", 1, {"a": 1.0}, True))] == [40, 41]
    made.store.note(first=20)
    assert [row.number for row in made.push(("w", 2, {"a": 1.0}, True))] == [42]


def test_the_order_of_the_reports_has_no_effect_on_the_row(opened):
    reports = [
        {"a": 0.1, "x": np.array([0.1, 7.0])},
        {"a": 0.7, "x": np.array([3.3])},
        {"a": 1e9, "x": np.array([1e-9])},
    ]
    made = opened(workers=3)
    rows = []
    for step, order in enumerate(itertools.permutations(enumerate(reports))):
        rows += made.push(*((f"w{i}", step, metrics, True) for i, metrics in order))
    assert len(rows) == 6
    assert len({tuple(sorted((k, v) for k, v in row.metrics.items() if k != "step")) for row in rows}) == 1


def test_reports_of_one_step_may_come_in_batches_of_several_processes_and_over_a_restart(opened):
    made = opened(Reduction(sums=("n",)), workers=2)
    assert made.push(("w", 0, {"n": 1}, False), sender="a", serial=0) == []
    made.reopen()
    assert made.push(("v", 0, {"n": 2}, True), sender="b", serial=0) == []
    assert values(made.push(("w", 0, {"n": 4}, True), sender="a", serial=1), "n") == [7]
    assert made.pipeline.inbox.senders["a"].received == 2


def test_the_row_of_the_highest_step_is_the_progress_whatever_came_last(opened):
    made = opened()
    made.push(("w", 7, {"a": 7.0, "text": "x"}, True), ("w", 3, {"a": 3.0}, True))
    assert made.pipeline.last_row == {"a": 7.0, "step": 7, "workers": 1}
    made.reopen()
    made.push(("w", 4, {"a": 4.0}, True))
    assert made.pipeline.last_row["step"] == 7
    made.push(("w", 8, {"a": 8.0}, True))
    assert made.pipeline.last_row["step"] == 8


def test_a_straggler_s_report_gets_a_row_of_its_own_and_nobody_s_attempt_is_mixed_with_it(opened):
    made = opened(workers=2)
    made.push(("w", 0, {"a": 1.0}, True), ("v", 0, {"a": 3.0}, True))
    made.push(("u", 0, {"a": 9.0}, True), sender="late")
    rows = made.pipeline.end()
    assert [row.metrics for row in rows] == [{"a": 9.0, "step": 0, "workers": 1}]
    assert (made.ledger().rows, made.ledger().partial, made.ledger().lost) == (2, 1, 0)


def test_fewer_workers_make_steps_whole_that_wait(opened):
    made = opened(workers=2)
    assert made.push(*(("w", step, {"a": float(step)}, False) for step in range(3))) == []
    assert values(made.pipeline.expect(1)) == [0, 1]
    assert values(made.push(("w", 3, {"a": 3.0}, False))) == [2]


# Totals and weights


def test_totals_add_up_over_steps_and_restarts(opened):
    made = opened(TrainingPipelineActor.reduction, workers=2, prefix="training/")
    rows = []
    for step in range(3):
        rows += made.push(*((f"w{i}", step, {"tokens": 10 * i}, True) for i in (1, 2)))
        made.reopen()
    assert values(rows, "training/tokens_total") == [30, 60, 90]


def test_a_total_leaves_out_what_is_no_number(opened):
    made = opened(Reduction(sums=("n",), totals=("n",)))
    tokens = [1, math.nan, "x", math.inf, 2]
    rows = made.push(*(("w", step, {"n": n}, True) for step, n in enumerate(tokens)))
    assert values(rows, "n_total") == [1, 1, None, 1, 3]
    assert math.isnan(rows[1].metrics["n"])  # but it stays visible in its own row


def test_totals_go_on_from_those_of_the_run_that_is_resumed(opened):
    made = opened()
    rule = Reduction(totals=("n",))
    made.pipeline.begin(rule, 1, {"n": 100, "other": 5})
    assert values(made.push(("w", 0, {"n": 1}, True)), "n_total") == [101]
    made.pipeline.begin(rule, 1, {"n": 7})  # a restart: what it counted itself is right
    assert values(made.push(("w", 1, {"n": 1}, True)), "n_total") == [102]
    assert made.pipeline.totals == {"n": 102}


def test_a_missing_weight_is_warned_of_once_with_its_count(opened):
    made = opened(Reduction(weights={"loss": "tokens"}))
    made.push(*(("w", step, {"loss": 1.0}, True) for step in range(3)))
    assert made.store.warnings == [
        "'loss' was reported without its weight 'tokens': such a row has the plain mean (3 times)"
    ]


def test_warnings_name_the_pipeline_and_are_told_once(opened):
    made, heard = opened(workers=2, prefix="training/"), []
    made.store.hear = heard.append
    for step in range(3):
        made.push(("w", step, {"a": "x"}, True), ("v", step, {"a": "y"}, True))
    assert heard == ["training/: 'a' differs between workers: one of them is kept"]
    made.reopen()
    made.push(("w", 3, {"a": "x"}, True), ("v", 3, {"a": "y"}, True))
    assert made.store.warnings == ["training/: 'a' differs between workers: one of them is kept (4 times)"]


# Batches under way


class Sender:
    """An outbox whose batches the network and the restarts of the actor bring in any order and any number of times."""

    UNDER_WAY = 4

    def __init__(self, name: str):
        self.name, self.made = name, 0
        self.under_way: dict[int, dict] = {}  # serial -> what was sent and not answered

    def send(self) -> None:
        if len(self.under_way) < self.UNDER_WAY:
            oldest = min(self.under_way, default=self.made)
            self.under_way[self.made] = dict(serial=self.made, oldest=oldest, said=2 * self.made + 2)
            self.made += 1

    def deliver(self, made: Opened, serial: int, answered: bool) -> list[Row]:
        """Brings a batch of two reports; without an answer it will come again."""
        items = [(self.name, 2 * serial + i, {self.name: 2 * serial + i}, True) for i in range(2)]
        rows = made.push(*items, sender=self.name, **self.under_way[serial])
        if answered:
            del self.under_way[serial]
        return rows


@settings(max_examples=300)
@given(st.data())
def test_each_sender_s_reports_are_taken_once_and_in_order_however_often_and_shuffled_its_batches_come(data):
    with tempfile.TemporaryDirectory() as folder:
        made, senders = Opened(Path(folder), workers=1), [Sender("a"), Sender("b")]
        rows = []
        for action in data.draw(
            st.lists(st.sampled_from(["send", "send", "answered", "lost", "restart"]), max_size=40)
        ):
            sender = data.draw(st.sampled_from(senders))
            if action == "send":
                sender.send()
            elif action == "restart":
                made.reopen()
            elif sender.under_way:
                serial = data.draw(st.sampled_from(sorted(sender.under_way)))
                rows += sender.deliver(made, serial, answered=action == "answered")
        for sender in senders:
            for serial in data.draw(st.permutations(sorted(sender.under_way))):
                rows += sender.deliver(made, serial, answered=True)
        for sender in senders:
            taken = [row.metrics[sender.name] for row in rows if sender.name in row.metrics]
            assert taken == list(range(2 * sender.made))
            state = made.pipeline.inbox.senders.get(sender.name)
            assert (
                (state.received, state.floor, state.early) == (2 * sender.made, sender.made, set()) if state else True
            )
        assert made.store.db.execute("SELECT count(*) FROM early").fetchone() == (0,)
        assert made.ledger().lost == 0
        assert "disk" not in made.store.facts.get("warnings", {})  # a batch that is there is no trouble of the disk
        made.store.close()


def test_a_batch_that_comes_early_waits_for_those_below_it_and_not_for_what_was_answered(opened):
    made = opened()
    assert made.push(("w", 1, {"a": 1.0}, True), serial=1, oldest=0) == []
    assert values(made.push(("w", 0, {"a": 0.0}, True), serial=0, oldest=0)) == [0, 1]
    assert made.push(("w", 4, {"a": 4.0}, True), serial=4, oldest=3) == []  # 2 was answered, by an earlier actor
    assert values(made.push(("w", 3, {"a": 3.0}, True), serial=3, oldest=3)) == [3, 4]


def test_repeats_are_counted_and_change_nothing(opened):
    made = opened()
    made.push(("w", 0, {"a": 1.0}, True), serial=0)
    for _ in range(2):
        assert made.push(("w", 0, {"a": 1.0}, True), serial=0) == []
    account = made.ledger()
    assert (account.reports, account.rows, account.repeats, account.lost) == (1, 1, 2, 0)


# What was said, received and lost


def test_what_a_worker_said_and_never_sent_is_lost(opened):
    made = opened()
    made.push(("w", 0, {"a": 1.0}, True), said=5)
    made.push(("v", 0, {"a": 1.0}, True), sender="b", serial=0, said=1, last=True)
    made.pipeline.died("a")
    made.pipeline.end()
    account = made.ledger()
    assert (account.reports, account.rows, account.lost, account.silent, account.ok) == (6, 2, 4, 0, False)


def test_the_dead_have_said_all_and_their_early_batches_are_taken(opened):
    made = opened()
    made.push(("w", 2, {"a": 2.0}, True), serial=2, oldest=1, said=6)
    assert values(made.pipeline.died("a")) == [2]
    made.pipeline.end()
    assert (made.ledger().reports, made.ledger().lost, made.ledger().silent) == (6, 5, 0)


def test_the_dead_are_done_with_the_steps_they_reported(opened):
    made = opened(workers=2)
    made.push(("w", 0, {"a": 1.0}, False), sender="a")
    made.push(("v", 0, {"a": 3.0}, True), sender="b")
    assert values(made.pipeline.died("a")) == [2]


def test_what_waits_behind_the_last_word_is_taken_at_the_end(opened):
    made = opened()
    made.push(("w", 0, {"a": 0.0}, True), serial=0, said=1, last=True)
    made.push(("w", 2, {"a": 2.0}, True), serial=2, oldest=1, said=3)
    assert values(made.pipeline.end()) == [2]
    assert (made.ledger().lost, made.ledger().silent) == (1, 0)


def test_who_says_nothing_at_the_end_is_silent_and_what_it_had_is_taken(opened):
    made = opened(workers=2)
    made.push(("w", 0, {"a": 1.0}, False), said=1)
    made.push(("v", 1, {"a": 1.0}, True), sender="b", serial=1, oldest=0, said=2)
    made.push(("u", 2, {"a": 1.0}, True), sender="c", serial=0, said=1, last=True)
    assert sorted(row.metrics["step"] for row in made.pipeline.end()) == [0, 1, 2]
    account = made.ledger()
    assert (account.silent, account.lost, account.reports, account.rows) == (2, 1, 4, 3)
    made.reopen()
    assert made.pipeline.ended
    assert made.ledger() == account


def test_the_late_news_of_a_death_do_not_concern_the_actor_that_came_back(opened):
    """An actor is the same worker after a restart of it, in another process."""
    made = opened(workers=2)
    made.push(("actor x", 0, {"a": 1.0}, False), sender="before")
    made.push(("actor x", 1, {"a": 1.0}, False), sender="after", serial=0)
    made.pipeline.died("before")
    made.push(("actor x", 1, {"a": 2.0}, False), sender="after", serial=1)
    rows = made.pipeline.end()
    assert [(row.metrics["step"], row.metrics["a"]) for row in rows] == [(0, 1.0), (1, 1.5)]


def test_rows_that_are_not_there_are_lost_with_the_reports_in_them(opened):
    made = opened(workers=2)
    for step in range(3):
        made.push(("w", step, {"a": 1.0}, True), ("v", step, {"a": 1.0}, True))
    made.push(("w", 3, {"a": 1.0}, True), last=True)
    made.pipeline.end()
    account = ledger(made.store, made.pipeline, lambda number: number != 1)
    assert (account.reports, account.rows, account.lost, account.partial) == (7, 3, 2, 1)


# Reports that can't be used


class Unknown:
    """As an object of a class that the pipeline actor can't import."""

    def __reduce__(self):
        return os.path.join, ()  # which raises


def test_a_report_that_can_not_be_unpickled_is_lost_alone_with_the_reason(opened):
    made = opened(workers=2)
    bad = ("w", 0, True, pack({"a": 1.0, "x": Unknown()}))
    good = [("v", 0, True, pack({"a": 3.0})), ("w", 1, True, pack({"a": 5.0})), ("v", 1, True, pack({"a": 7.0}))]
    rows = made.pipeline.push(Batch("", "a", (NODE, 7), 0, 0, 4, True, [bad, *good]))
    assert values(rows) == [3, 6]
    account = made.ledger()
    assert (account.reports, account.rows, account.lost) == (4, 2, 1)
    assert account.warnings[0].startswith("the pipeline actor can't read a report: join() missing 1 required")


def test_a_step_of_which_nothing_can_be_unpickled_has_no_row(opened):
    made = opened()
    items = [("w", 0, True, pack({"x": Unknown()})), ("w", 1, True, pack({"a": 1.0}))]
    assert values(made.pipeline.push(Batch("", "a", (NODE, 7), 0, 0, 2, True, items)), "step") == [1]
    assert (made.ledger().lost, made.ledger().rows) == (1, 1)


class Incomparable(wandb.Html):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("incomparable")

    __hash__ = None


def test_values_that_can_not_be_reduced_are_lost_values_and_their_row_stays(opened):
    made = opened(workers=2)
    pages = [{"a": 1.0, "page": Incomparable(text)} for text in "xy"]
    [row] = made.push(*((f"w{i}", 0, metrics, True) for i, metrics in enumerate(pages)), last=True, said=2)
    assert row.metrics == {"a": 1.0, "step": 0, "workers": 2}
    account = made.ledger()
    assert (account.rows, account.lost, account.lost_values, account.ok) == (1, 0, 1, False)


# Restarts


CALLS = st.one_of(
    *[st.tuples(st.just("say"), st.sampled_from("uvw"), st.integers(0, 3), st.booleans())] * 4,
    st.tuples(st.just("gone"), st.sampled_from("uvw")),
    st.tuples(st.just("died"), st.sampled_from("uvw")),
    st.tuples(st.just("expect"), st.integers(1, 3)),
)


def call(made: Opened, number: int, event: tuple) -> list[Row]:
    match event:
        case "say", worker, step, commit:
            metrics = {"n": number, "x": np.array([float(number)])}
            return made.push((worker, step, metrics, commit), sender=worker, serial=number, oldest=number)
        case "gone", worker:
            return made.push((worker, None, False), sender=worker, serial=number, oldest=number)
        case "died", worker:
            return made.pipeline.died(worker) if worker in made.pipeline.inbox.senders else []
        case "expect", workers:
            return made.pipeline.expect(workers)


@given(st.integers(1, 3), st.lists(CALLS, min_size=1, max_size=25), st.data())
def test_a_store_that_is_opened_again_goes_on_as_if_nothing_had_happened(workers, calls, data):
    restarts = data.draw(st.sets(st.integers(0, len(calls) - 1)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        rule = Reduction(sums=("n",), totals=("n",))
        straight, broken = Opened(Path(one), rule, workers), Opened(Path(two), rule, workers)
        for number, event in enumerate(calls):
            if number in restarts:
                broken.reopen()
            assert call(broken, number, event) == call(straight, number, event)
        assert broken.pipeline.end() == straight.pipeline.end()
        assert broken.pipeline.counts == straight.pipeline.counts
        assert broken.pipeline.last_row == straight.pipeline.last_row
        reports = sum(event[0] == "say" for event in calls)
        assert (broken.ledger().reports, broken.ledger().lost) == (reports, 0)
        straight.store.close()
        broken.store.close()


def test_a_death_is_remembered(opened):
    made = opened(workers=3)
    made.push(("w", 0, {"a": 0.0}, False), sender="a")
    made.pipeline.died("a")
    made.reopen()
    assert values(made.push(("v", 1, {"a": 1.0}, False), sender="b")) == [0]


def test_open_steps_keep_their_order(opened):
    made = opened(workers=2)
    made.push(*(("w", step, {"a": float(step)}, False) for step in (1, 0, 2)))
    made.reopen()
    assert values(made.pipeline.expect(1)) == [1, 0]


def test_rows_stay_in_the_store_and_those_that_wandb_lacks_are_found(opened):
    made = opened()
    for step in range(6):
        made.push(("w", step, {"a": float(step)}, True))
    made.reopen()
    there = {0, 1, 4}
    missing = list(made.store.missing(there.__contains__, max(there)))
    assert [(row.number, row.metrics["a"]) for row in missing] == [(5, 5.0), (6, 2.0), (7, 3.0)]
    assert [row.number for row in made.push(("w", 6, {"a": 6.0}, True))] == [8]
    assert list(made.store.missing(lambda number: True, 8)) == []


# A full disk


@contextlib.contextmanager
def no_pages(made: Opened) -> Iterator[None]:
    """SQLite may not make its file longer."""
    made.store.db.execute("PRAGMA max_page_count = 1")  # or what there is
    yield
    made.store.db.execute("PRAGMA max_page_count = 1073741823")


@contextlib.contextmanager
def no_longer_files(made: Opened) -> Iterator[None]:
    """The kernel lets this process make no file longer."""
    longest, (soft, hard) = made.path.with_name(made.path.name + "-wal"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest.stat().st_size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_space(made: Opened) -> Iterator[None]:
    """The disk is full."""
    filler = made.path.with_name("filler")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    filler.unlink()


def ways(way) -> str:
    return way.__name__


@pytest.fixture(params=[no_pages, no_longer_files, no_space], ids=ways)
def full(request, tmp_path) -> Iterator:
    if request.param is not no_space:
        yield request.param
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk; the other two ways to fill it are tested")
    yield request.param
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


BIG = "x" * 1_000_000


def test_a_full_disk_loses_only_the_batches_it_has_no_room_for_and_that_ends_when_it_has(opened, full):
    made = opened()
    made.push(("w", 0, {"a": 0.0}, True), said=1)
    made.push(("w", 1, {"a": 1.0}, False), said=2)
    with full(made):
        assert made.push(("w", 2, {"a": 2.0, "text": BIG}, False), ("w", 3, {"a": 3.0}, False), said=4) == []
    rows = made.push(("w", 4, {"a": 4.0}, True), said=5, last=True)
    assert values(rows) == [1, 4]
    made.reopen()
    assert made.pipeline.end() == []
    account = made.ledger()
    assert (account.reports, account.rows, account.lost, account.silent) == (5, 3, 2, 0)
    assert len(account.warnings) == 1
    assert account.warnings[0].endswith("reports get lost until that ends, training goes on")


def test_what_is_behind_a_batch_that_was_missed_does_not_wait_for_it(opened, full):
    made, big = opened(), ("w", 0, {"text": BIG}, True)
    with full(made):
        made.push(big, serial=0, oldest=0, said=1)
    assert values(made.push(("w", 1, {"a": 1.0}, True), serial=1, oldest=0, said=2)) == [1]
    with full(made):
        made.push(big, serial=3, oldest=2, said=4)
        made.push(big, serial=2, oldest=2, said=4)
    assert values(made.push(("w", 4, {"a": 4.0}, True), serial=4, oldest=2, said=5)) == [4]
    with full(made):
        made.push(big, serial=5, oldest=5, said=6, last=True)
    assert made.pipeline.inbox.senders["a"].ended
    account = made.ledger()
    assert (account.reports, account.lost) == (6, 4)


by_the_kernel = pytest.mark.parametrize("full", [no_longer_files, no_space], indirect=True, ids=ways)


@by_the_kernel
def test_what_a_full_disk_has_missed_is_known_through_other_failures(opened, full):
    made = opened()
    made.push(("w", 0, {"a": 0.0}, True), serial=0, said=1)
    with full(made):
        made.push(("w", 1, {"text": BIG}, True), serial=1, said=3, last=True)
        with pytest.raises(sqlite3.Error):
            made.pipeline.tick()
    made.pipeline.end()
    assert (made.ledger().reports, made.ledger().lost, made.ledger().silent) == (3, 2, 0)


@by_the_kernel
def test_a_full_disk_is_no_reason_not_to_expect_fewer(opened, full):
    made = opened(workers=2)
    made.push(("w", 0, {"a": 0.0, "text": BIG}, True))
    with full(made):
        assert made.pipeline.expect(1) == []
    assert values(made.push(("w", 1, {"a": 1.0}, True))) == [1]


@by_the_kernel
def test_a_full_disk_at_the_end_loses_what_it_has_no_room_for(opened, full):
    made = opened(workers=2)
    made.push(("w", 0, {"a": 0.0, "text": BIG}, True), said=1, last=True)
    with full(made):
        assert made.pipeline.end() == []
    assert made.pipeline.ended
    account = made.ledger()
    assert (account.reports, account.rows, account.lost, account.silent) == (1, 0, 1, 0)


def test_facts_and_warnings_need_no_disk(opened, full):
    made = opened()
    with full(made):
        made.store.note(name="n", text=BIG)
        made.store.warn("kind", "a warning")
    assert (made.store.facts["name"], made.store.warnings) == ("n", ["a warning"])
    made.push(("w", 0, {"a": 1.0}, True))  # there is room again
    made.reopen()
    assert (made.store.facts["name"], made.store.warnings) == ("n", ["a warning"])


def test_a_transaction_that_failed_leaves_nothing_behind(opened):
    made = opened()
    with pytest.raises(ZeroDivisionError), made.store.transaction():
        made.store.add_row("", 1, {"a": 1.0})
        made.store.note(known=1)  # but what is known stays so
        raise ZeroDivisionError
    with pytest.raises(sqlite3.Error), no_pages(made), made.store.transaction():
        made.store.add_row("", 1, {"a": 1.0})
        made.store.add_row("", 1, {"a": BIG})
    made.reopen()
    assert made.store.facts["known"] == 1
    assert made.store.db.execute("SELECT count(*) FROM rows").fetchone() == (0,)
    assert [row.number for row in made.push(("w", 0, {"a": 1.0}, True))] == [0]
