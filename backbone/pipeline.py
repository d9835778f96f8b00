"""A pipeline of a run: what comes in from its workers is closed by step, reduced and given a number."""

from __future__ import annotations

import contextlib
import math
import pickle
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import values
from .inbox import Batch, Inbox
from .ledger import line
from .reduction import REFUSED, Reduction, reduce_reports
from .steps import Pace, Place, Steps
from .store import Row, Store


class Pipeline:
    """One pipeline of a run. Methods that may make rows return them.

    A method that raises sqlite3.Error (the disk is full) has changed nothing, neither on the disk nor here.
    """

    def __init__(self, store: Store, prefix: str, reduction: Reduction):
        self._store, self.prefix, self.reduction = store, prefix, reduction
        self.inbox = Inbox(store, prefix)
        new = pickle.dumps((1, Pace(), {}, Counter(), {}, False))
        row = (prefix, pickle.dumps(reduction), new)
        store.db.execute("INSERT OR IGNORE INTO pipelines VALUES (?, ?, ?)", row)
        self._load()

    @classmethod
    def all(cls, store: Store) -> dict[str, Pipeline]:
        """Those that are in a store, by prefix."""
        found = store.db.execute("SELECT prefix, reduction FROM pipelines ORDER BY rowid").fetchall()
        return {prefix: cls(store, prefix, pickle.loads(reduction)) for prefix, reduction in found}

    def begin(self, reduction: Reduction, workers: int, totals: dict[str, float]) -> None:
        """Takes reports from now on. `totals`: the running sums of the run that is resumed."""
        with self._change():
            self.reduction, self.steps.workers, self.ended = reduction, workers, False
            update = "UPDATE pipelines SET reduction = ? WHERE prefix = ?"
            self._store.db.execute(update, (pickle.dumps(reduction), self.prefix))
            self.totals = {key: value for key, value in totals.items() if self.reduction.rule(key).total} | self.totals

    def push(self, batch: Batch) -> list[Row]:
        """Takes a batch, unless it came before."""
        try:
            with self._change() as rows:
                ready = self.inbox.put(batch)
                self.counts["repeats"] += ready is None
                self._take(ready or ())
            return rows
        except sqlite3.Error as error:  # the batch is lost: what was said and not received is counted at the end
            self.inbox.miss(batch)
            self._warn_of_the_disk(error)
            return []

    def died(self, sender_id: str) -> list[Row]:
        """The process of a sender is dead; what it had not sent is lost."""
        with self._change() as rows:
            self._take(self.inbox.dead(sender_id))
            worker = self.inbox.senders[sender_id].worker
            others = [sender for id_, sender in self.inbox.senders.items() if id_ != sender_id]
            if not any(sender.worker == worker and not sender.ended for sender in others):  # an actor may be back
                self._touched.add(worker)
                self.steps.gone(worker, time.time(), dead=True)
        return rows

    def expect(self, workers: int) -> list[Row]:
        try:
            with self._change() as rows:
                self.steps.expect(workers)
            return rows
        except sqlite3.Error as error:
            self.steps.workers = workers
            self._warn_of_the_disk(error)
            return []

    def tick(self) -> list[Row]:
        """To be called now and then: closes steps by the clock."""
        with self._change() as rows:
            self.steps.tick(time.time())
        return rows

    def end(self) -> list[Row]:
        """Closes all steps with the reports that came. What a full disk has no room for is lost."""
        try:
            with self._change() as rows:
                silent = [id_ for id_, sender in self.inbox.senders.items() if not sender.ended]
                for id_ in [*silent, *(id_ for id_, sender in self.inbox.senders.items() if sender.early)]:
                    self._take(self.inbox.dead(id_))
                self.counts["silent"] += len(silent)
                self.steps.finish()
                self._store.db.execute("DELETE FROM workers WHERE prefix = ?", (self.prefix,))
                self.ended = True
            return rows
        except sqlite3.Error as error:
            self.ended = True
            self._warn_of_the_disk(error)
            return []

    def _warn_of_the_disk(self, error: sqlite3.Error) -> None:
        self._warn("disk", f"{line(error)}: reports get lost until that ends, training goes on")

    def _take(self, batches: Sequence[Batch]) -> None:
        for worker, step, commit, metrics in (item for batch in batches for item in batch.items):
            self._touched.add(worker)
            if step is None:
                self.steps.gone(worker, time.time())
            else:
                self.counts["reports"] += 1
                self._next_id += 1
                self._fresh[self._next_id] = worker, step, metrics
                self.steps.log(worker, step, self._next_id, commit, time.time())

    # Rows

    def _row(self, step: int, reports: dict[str, list[int]]) -> None:
        """Called by `steps`: all reports of a step become a row."""
        ids = [id_ for each in reports.values() for id_ in each]
        packed = [self._fresh.pop(id_)[2] for id_ in ids if id_ in self._fresh]
        if len(packed) < len(ids):
            where, these = "FROM reports WHERE prefix = ? AND step = ?", (self.prefix, step)
            packed += [metrics for (metrics,) in self._store.db.execute(f"SELECT metrics {where}", these)]
            self._store.db.execute(f"DELETE {where}", these)
        unpacked = map(self._unpack, sorted(packed))  # the order they came in has no effect
        metrics = [report for report in unpacked if report is not None]
        if not metrics:
            return
        row = reduce_reports(metrics, self.reduction, self._warn)
        row |= _add(row, self.totals, self.reduction) | {"step": step, "workers": len(reports)}
        self.counts.update(rows=1, partial=len(reports) < self.steps.workers)
        if step >= self.last_row.get("step", 0):
            self.last_row = {key: value for key, value in row.items() if isinstance(value, int | float)}
        prefixed = {self.prefix + key: value for key, value in row.items()}
        self._rows.append(self._store.add_row(self.prefix, len(metrics), prefixed))

    def _unpack(self, packed: bytes) -> dict[str, Any] | None:
        try:
            return values.unpack(packed)
        except Exception as error:  # a class of the user's that this process can't import
            self._warn("unreadable", f"the pipeline actor can't read a report: {line(error)}")
            return None

    def _warn(self, kind: str, what: str) -> None:
        self.counts["lost_values"] += kind == REFUSED
        self._store.warn(f"{self.prefix}{kind}", f"{self.prefix}: {what}" if self.prefix else what)

    # State

    @contextlib.contextmanager
    def _change(self) -> Iterator[list[Row]]:
        """One transaction, on the disk and here."""
        self._rows: list[Row] = []
        try:
            with self._store.transaction():
                yield self._rows
                self._save()
        except BaseException:
            self._load()
            raise

    def _save(self) -> None:
        db, now = self._store.db, time.time()
        new = [(self.prefix, id_, step, worker, now, packed) for id_, (worker, step, packed) in self._fresh.items()]
        db.executemany("INSERT INTO reports VALUES (?, ?, ?, ?, ?, ?)", new)
        self._fresh.clear()
        for worker in self._touched:
            place = self.steps.places.get(worker)
            if place or worker in self.steps.dead:
                row = (self.prefix, worker, *(place or Place(0, False, 0.0)), place is None)
                db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?, ?)", row)
            else:
                db.execute("DELETE FROM workers WHERE prefix = ? AND worker = ?", (self.prefix, worker))
        self._touched.clear()
        self.inbox.save()
        of_steps = self.steps.workers, self.steps.pace
        state = pickle.dumps((*of_steps, self.totals, self.counts, self.last_row, self.ended))
        db.execute("UPDATE pipelines SET state = ? WHERE prefix = ?", (state, self.prefix))

    def _load(self) -> None:
        db, mine = self._store.db, (self.prefix,)
        (state,) = db.execute("SELECT state FROM pipelines WHERE prefix = ?", mine).fetchone()
        workers, pace, self.totals, self.counts, self.last_row, self.ended = pickle.loads(state)
        self.inbox.load()
        self._fresh: dict[int, tuple[str, int, bytes]] = {}  # reports of this change that have no row: id -> report
        self._touched: set[str] = set()  # workers that this change moves
        (self._next_id,) = db.execute("SELECT coalesce(max(id), 0) FROM reports WHERE prefix = ?", mine).fetchone()
        self.steps = Steps(workers, self._row, self._warn)
        self.steps.pace = pace
        for _, worker, step, committed, heard, dead in db.execute("SELECT * FROM workers WHERE prefix = ?", mine):
            self.steps.dead.update([worker] if dead else [])
            self.steps.places.update({} if dead else {worker: Place(step, bool(committed), heard)})
        for _, id_, step, worker, heard, _ in db.execute("SELECT * FROM reports WHERE prefix = ? ORDER BY id", mine):
            self.steps.restore(worker, step, id_, heard)


def _add(row: Mapping[str, Any], totals: dict[str, float], reduction: Reduction) -> dict[str, float]:
    """Adds a row to the running sums; what they are now, under the keys of a row."""
    keys = [key for key in row if reduction.rule(key).total and isinstance(row[key], int | float)]
    for key in keys:
        totals[key] = totals.get(key, 0) + (row[key] if math.isfinite(row[key]) else 0)
    return {f"{key}_total": totals[key] for key in keys}
