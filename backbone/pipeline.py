"""A pipeline of a run: reports in, numbered rows out."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from . import records, values
from .ledger import line
from .reduction import BETTER, REFUSED, Reduction, reduce_reports
from .state import Row, State
from .steps import OpenStep, Steps


class Report(NamedTuple):
    """A report that waits for its step to be over."""

    wall_time: float
    who: str
    metrics: bytes


class Pipeline:
    """Takes what the workers of a pipeline report. What has changed is in the queue of the state after `save`."""

    KEPT: ClassVar = ("steps", "counts", "totals", "best", "latest", "last_row", "_last_id")  # in the state

    def __init__(self, state: State, number: int, prefix: str, reduction: Reduction, workers: int):
        self._state, self.number, self.prefix, self.reduction = state, number, prefix, reduction
        self.steps, self.counts = Steps(workers), Counter()
        self.totals: dict[str, float] = {}
        self.best: dict[str, float] = {}  # of the keys that `reduction.best` names
        self.latest: dict[str, float] = {}  # of the same keys
        self.last_row: dict[str, float] = {}  # numbers of the row of the highest step, keys without prefix
        self._last_id = 0
        state.do("INSERT OR IGNORE INTO pipelines VALUES (?, ?, ?, NULL)", number, prefix, pickle.dumps(reduction))

    @classmethod
    def all(cls, state: State) -> list[Pipeline]:
        """Those that are in a state, in the order in which they joined the run."""
        found = state.db.execute("SELECT * FROM pipelines ORDER BY number").fetchall()
        pipelines = []
        for number, prefix, reduction, saved in found:
            pipeline = cls(state, number, prefix, pickle.loads(reduction), 1)
            vars(pipeline).update(pickle.loads(saved) if saved else {})
            pipelines.append(pipeline)
        return pipelines

    def begin(self, reduction: Reduction, workers: int, kept: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Takes reports from now on, and goes on with running sums and best values of the run that is resumed.

        kept: what its ledger's file has of this pipeline. summary: W&B's, of the run.
        """
        self.reduction, self.steps.workers = reduction, workers
        here, on_server = kept.get("totals", {}), {}
        for name, value in summary.items():
            key = name.removeprefix(self.prefix).removesuffix("_total")
            if name == f"{self.prefix}{key}_total" and isinstance(value, int | float) and math.isfinite(value):
                on_server[key] = value
        newest = max(map(int, kept.get("row_reports", ())), default=kept.get("first", 0) - 1)  # row here
        known = on_server | here if newest > summary.get("_step", -1) else here | on_server
        self.totals = {key: value for key, value in known.items() if reduction.rule(key).total} | self.totals
        self._improve(kept.get("best", {}))
        for key, op in reduction.best.items():
            with contextlib.suppress(KeyError, TypeError):  # a server has max and last of a key below it
                self._improve({key: summary[self.prefix + key][op]})
        self._state.do("UPDATE pipelines SET reduction = ? WHERE number = ?", pickle.dumps(reduction), self.number)

    def log(self, report: Report, worker: str, step: int, commit: bool, now: float, counted_as: str, task: str) -> None:
        """Takes a report. For all else that happens to a step there is `steps`; see there for the arguments."""
        self.counts["reports"] += 1
        self._last_id += 1
        key = self.number, self._last_id
        self._state.do("INSERT INTO reports VALUES (?, ?, ?, ?, ?)", *key, *report, key=key)
        self.steps.log(worker, step, self._last_id, commit, now, counted_as, task)

    # Rows

    def make_rows(self) -> list[Row]:
        """Makes the rows of the steps that are over, and gives each its number."""
        over, self.steps.over = self.steps.over, []
        warnings, self.steps.warnings = self.steps.warnings, []
        for kind, what in warnings:
            self._warn(kind, what)
        rows = [self._row(step, open_step) for step, open_step in over]
        return [row for row in rows if row]

    def _row(self, step: int, finished: OpenStep) -> Row | None:
        """Reduces all reports of a step to a row. None if none of them can be read."""
        reports = [self._take(id_) for ids in finished.reports.values() for id_ in ids]
        reports.sort(key=lambda report: report.metrics)  # so that the order in which they came has no effect
        read = [(metrics, report.who) for report in reports if (metrics := self._unpack(report)) is not None]
        if not read:
            return None
        metrics, who = zip(*read, strict=True)
        row = reduce_reports(metrics, self.reduction, self._warn, who)
        added = _add_to_totals(row, self.totals, self.reduction)
        for key in row.keys() & added.keys():
            self._warn("logged and computed", f"{key!r} is logged, and a running sum as well: the sum is kept")
        row |= added | {"step": step, "workers": len(finished.workers)}
        self._remember(step, row)
        self.counts.update(rows=1, partial=finished.partial)
        fitting, packed = self._fit({self.prefix + key: value for key, value in row.items()})
        return self._state.add_row(self.number, len(read), fitting, packed, max(each.wall_time for each in reports))

    def _remember(self, step: int, row: Mapping[str, Any]) -> None:
        self._improve(row)
        self.latest |= {key: row[key] for key in self.reduction.best if isinstance(row.get(key), int | float)}
        if step >= self.last_row.get("step", 0):
            self.last_row = {key: value for key, value in row.items() if isinstance(value, int | float)}

    def _improve(self, row: Mapping[str, Any]) -> None:
        for key, op in self.reduction.best.items():
            if isinstance(value := row.get(key), int | float) and math.isfinite(value):
                self.best[key] = BETTER[op](value, self.best.get(key, value))

    def best_values(self) -> dict[str, dict[str, float]]:
        """As W&B has them in the summary: after a restart W&B itself knows only the values since."""
        return {
            f"{self.prefix}{key}": {self.reduction.best[key]: value, "last": self.latest[key]}
            for key, value in self.best.items()
            if key in self.latest  # else there is nothing new of it
        }

    def _take(self, id_: int) -> Report:
        key = self.number, id_
        if report := self._state.take_back(key):  # it is not on the disk yet
            return Report(*report[2:])  # behind the key
        self._state.do("DELETE FROM reports WHERE pipeline = ? AND id = ?", *key)
        query = "SELECT wall_time, who, metrics FROM reports WHERE pipeline = ? AND id = ?"
        return Report(*self._state.db.execute(query, key).fetchone())

    def _unpack(self, report: Report) -> dict[str, Any] | None:
        try:
            return values.unpack(report.metrics)
        except Exception as error:  # a class of the user's that this process can't import
            self._warn("unreadable", f"the pipeline actor can't read a report: {line(error)}")
            return None

    def _fit(self, metrics: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """A row without those values that the state can't keep, or that make it too large for it; and packed."""
        try:
            packed = values.pack(metrics)
        except TypeError as error:  # a class of the user's that can be sent once only
            if len(metrics) == 1:
                self._warn(f"{REFUSED} {next(iter(metrics))}", line(error))
                return {}, values.pack({})
            metrics = {k: v for key in metrics for k, v in self._fit({key: metrics[key]})[0].items()}
            packed = values.pack(metrics)
        while len(packed) > records.LARGEST:
            largest = max(metrics, key=lambda key: len(values.pack({key: metrics[key]})))
            why = f"a row has {len(packed) >> 20} MB, so {largest!r}, its largest value, is left out"
            self._warn(f"{REFUSED} {largest}", why)
            metrics = {key: value for key, value in metrics.items() if key != largest}
            packed = values.pack(metrics)
        return metrics, packed

    def _warn(self, kind: str, what: str) -> None:
        self.counts["lost_values"] += kind.startswith(REFUSED)
        self._state.warn(f"{self.prefix}{kind}", f"{self.prefix}: {what}" if self.prefix else what)

    # State

    def save(self) -> None:
        """What is here is on the disk with the next commit."""
        state = pickle.dumps({name: getattr(self, name) for name in self.KEPT})
        self._state.do("UPDATE pipelines SET state = ? WHERE number = ?", state, self.number, key=self.number)


def _add_to_totals(row: Mapping[str, Any], totals: dict[str, float], reduction: Reduction) -> dict[str, float]:
    """Adds a row to the running sums; what they are now, under the keys of a row."""
    keys = [key for key in row if reduction.rule(key).total and isinstance(row[key], int | float)]
    for key in keys:
        totals[key] = totals.get(key, 0) + (row[key] if math.isfinite(row[key]) else 0)
    return {f"{key}_total": totals[key] for key in keys}
