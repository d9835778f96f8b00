"""When a step becomes a row. The rule, free of Ray, wandb and SQL.

A *worker* is who logs: an actor, a task, or else a process. It is *done* with a step once it has reported it and then
another one, or has said so (`commit=True`), or is gone. An open step becomes a row

1. when `workers` workers have reported it and are done with it;
2. before a report is taken that shows that it is over: (a) one by a worker that was done with this step (the next
   epoch, a rewind); (b) the first one of an actor or process, for the steps that a dead worker had reported and those
   that `workers` workers have reported (a restart's new processes);
3. by the clock: when nothing has come for it for a minute (if `workers` have reported it), or for ten times the usual
   time between rows, and nobody at a lower step can be expected to report it;
4. at `finish`, and the oldest one while too many reports wait.

Only the clock compares step numbers: epochs that count from 0 again are as good as steps that go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple


class Place(NamedTuple):
    """Where a worker stands."""

    step: int
    committed: bool  # it is done with that step
    heard: float  # when, in seconds


class Pace(NamedTuple):
    """How fast rows of rule 1 come, in seconds."""

    usual: float = 0.0  # between two of them
    last: float = 0.0  # when the last one was made


@dataclasses.dataclass
class OpenStep:
    """A step that has no row yet."""

    reports: dict[str, list[int]]  # worker -> what stands for its reports
    done: int = 0  # how many of these workers are done with it
    heard: float = 0.0


def is_task(worker: str) -> bool:
    return worker.startswith("task")


class Steps:
    """The open steps of a pipeline and where its workers stand.

    close: called with a step and its reports by worker, when it becomes a row.
    warn: called with a kind and a sentence.
    """

    MINUTE: ClassVar = 60.0
    MAX_WAITING: ClassVar = 100_000  # reports in open steps

    def __init__(
        self, workers: int, close: Callable[[int, dict[str, list[int]]], None], warn: Callable[[str, str], None]
    ):
        self.workers, self._close, self._warn = workers, close, warn
        self.open: dict[int, OpenStep] = {}  # oldest first
        self.places: dict[str, Place] = {}
        self.dead: set[str] = set()
        self.pace = Pace()
        self._waiting = 0
        self._newest = -1  # the highest step that all workers have reported
        self._together: set[str] = set()  # who has logged since the last newcomer did
        self._most = 0  # so many workers have been warned of

    def log(self, worker: str, step: int, report: int, commit: bool, now: float) -> None:
        place, open_step = self.places.get(worker), self.open.get(step)
        stood = None if place is None or place.committed else place.step
        if open_step and worker in open_step.reports and stood != step:
            self._row(step)  # 2a
        if place is None and not is_task(worker):
            for other, being in list(self.open.items()):
                if self.dead & being.reports.keys() or len(being.reports) >= self.workers:
                    self._row(other)  # 2b
            self.dead.discard(worker)
            self._together.clear()
        self._add(worker, step, report, now)
        self._look_back(worker, step, place)
        self.places[worker] = Place(step, commit, now)
        if stood not in (None, step):
            self._done(stood, worker, now)
        if commit:
            self._done(step, worker, now)
        while self._waiting > self.MAX_WAITING:
            self._row(next(iter(self.open)))  # 4

    def gone(self, worker: str, now: float, dead: bool = False) -> None:
        """It will report nothing more: it has said so, or has died."""
        place = self.places.pop(worker, None)
        self._together.discard(worker)
        if dead and place:  # a task that has said goodbye does not die any more
            in_open_steps = {each for being in self.open.values() for each in being.reports}
            self.dead = (self.dead | {worker}) & in_open_steps
        if place and not place.committed:
            self._done(place.step, worker, now)

    def expect(self, workers: int) -> None:
        self.workers = workers
        self._together.clear()
        for step in [step for step, being in self.open.items() if being.done >= workers]:
            self._row(step)

    def tick(self, now: float) -> None:
        """Rule 3."""
        for step, being in list(self.open.items()):
            whole = len(being.reports) >= self.workers
            patience = self.MINUTE if whole else max(self.MINUTE, 10 * self.pace.usual)
            if now - being.heard < patience:
                continue
            if whole or not any(
                place.step < step and not place.committed and now - place.heard < patience
                for worker, place in self.places.items()
                if worker not in being.reports
            ):
                if not whole:
                    self._warn(
                        "few workers",
                        f"step {step} stands on {len(being.reports)} of {self.workers} workers; pass workers="
                        f"{len(being.reports)} if no more log, call expect() if some have died",
                    )
                self._row(step)

    def finish(self) -> None:
        for step in sorted(self.open):
            self._row(step)
        self.places.clear()
        self.dead.clear()

    def restore(self, worker: str, step: int, report: int, heard: float) -> None:
        """A report that was taken before the pipeline actor died. `places` must be there."""
        self._add(worker, step, report, heard)
        place = self.places.get(worker)
        if self.open[step].reports[worker] == [report] and (not place or place.committed or place.step != step):
            self.open[step].done += 1

    def _add(self, worker: str, step: int, report: int, now: float) -> None:
        being = self.open.setdefault(step, OpenStep({}))
        being.reports.setdefault(worker, []).append(report)
        being.heard = now
        self._waiting += 1

    def _done(self, step: int, worker: str, now: float) -> None:
        being = self.open.get(step)
        if being and worker in being.reports:
            being.done += 1
            if being.done >= self.workers:  # 1
                since = now - (self.pace.last or now)
                self.pace = Pace(0.8 * self.pace.usual + 0.2 * since, now)
                self._newest = max(self._newest, step)
                self._row(step)

    def _row(self, step: int) -> None:
        reports = self.open.pop(step).reports
        self._waiting -= sum(map(len, reports.values()))
        self._close(step, reports)

    def _look_back(self, worker: str, step: int, place: Place | None) -> None:
        """Warns of what people do without knowing."""
        many = 0
        if is_task(worker):
            many = sum(map(is_task, self.open[step].reports))
        elif worker not in self._together:
            self._together.add(worker)
        elif step != place.step:  # all have had their turn
            many = len(self._together)
        if many > max(self.workers, self._most):
            self._most = many
            self._warn(
                "many workers",
                f"{many} workers log to a pipeline that was told of {self.workers}: pass workers={many}",
            )
        before = place.step if place else self._newest
        if step < before and not is_task(worker):
            self._warn("went back", f"steps went back from {before} to {step}: each attempt gets rows of its own")
