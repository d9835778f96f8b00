"""When a step becomes a row. The rule, free of Ray, wandb and SQL.

A *worker* is one life of somebody who logs: an actor's process, an attempt of a task, else a process. It is *done* with
a step when it has reported it and then another, or has said so (`commit=True`), or has ended. A step becomes a row

1. when all who have reported it are done with it, and they are `workers`. Who ended ten seconds ago or longer need not
   have reported it, if somebody who has, and lives, had logged before that end, and no task reports it. Until then
   somebody may take the place: a restart, actors that are made anew for each step;
2. before a report is taken that is a second attempt: by a worker that was done with the step (the next epoch, a
   rewind), by one that first logged after a worker of that step had died (a restart), or by another attempt of a task;
3. by the clock: a step that `workers` have reported, when nothing has come for it for a minute; any other, after ten
   times the usual time between two rows, a minute at least, unless a worker that was heard of within that time stands
   at a lower step;
4. at `finish`, at `expect` where that makes it complete, and the oldest one while too many reports wait.

Only the clock compares step numbers: epochs that count from 0 again are as good as steps that go on.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass
class Worker:
    """One life of somebody who logs."""

    name: str
    counted_as: str  # whom it is counted as: itself, or, for a child process, its parent
    task: str  # what all attempts of a task share; nothing for others
    birth: int  # its number among all births and ends of workers, in their order
    step: int = -1  # the last one that it has reported
    busy_with: int | None = None  # that step, until it is done with it
    regular: bool = False  # it has reported more than one
    heard: float = 0.0  # when it last reported, in seconds of the pipeline's clock
    end: int = 0  # the number of its end among them; 0 as long as it lives
    end_time: float = 0.0
    steps: set[int] = dataclasses.field(default_factory=set)  # open ones that it has reported


@dataclasses.dataclass
class OpenStep:
    """A step that has no row yet."""

    reports: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # worker -> the ids of its reports
    workers: set[str] = dataclasses.field(default_factory=set)  # whom these workers are counted as
    busy: int = 0  # how many of these workers are not done with it
    heard: float = 0.0
    first_death: float = math.inf  # among its workers, as `Worker.end`
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)  # task -> the attempt that has reported it last
    partial: bool = False  # in the end: fewer workers have reported it than make a step complete

    def add(self, worker: Worker, report_id: int, now: float) -> None:
        if worker.name not in self.reports:
            self.workers.add(worker.counted_as)
            self.busy += 1
            if worker.task:
                self.tasks[worker.task] = worker.name
        self.reports.setdefault(worker.name, []).append(report_id)
        self.heard = now


class Steps:
    """The open steps of a pipeline; `workers` make one complete. Times are seconds of one clock. It can be pickled."""

    MINUTE = 60.0
    GRACE = 10.0  # in which somebody may take the place of one who has ended
    MAX_WAITING = 100_000  # reports in open steps

    def __init__(self, workers: int):
        self.workers = workers
        self.over: list[tuple[int, OpenStep]] = []  # steps that are over; whoever calls the methods takes them
        self.warnings: list[tuple[str, str]] = []  # each a kind and a sentence; so are these
        self.open: dict[int, OpenStep] = {}  # oldest first
        self.known: dict[str, Worker] = {}  # the living, and those of the ended that still matter
        self._ended: dict[str, Worker] = {}  # the last that have ended; without tasks and children
        self._events = 0  # births and ends so far
        self._newest = -1  # the highest step that was complete
        self._usual, self._last = 0.0, math.nan  # seconds between two rows of rule 1, and when the last was made
        self._waiting = 0  # reports in open steps
        self._warned_of = 0  # workers: the largest number that a warning has named

    def log(self, name: str, step: int, report_id: int, commit: bool, now: float, counted_as: str = "", task: str = ""):
        """Takes a report of a worker. counted_as: whom, if not as itself. task: see `Worker`."""
        if not (worker := self.known.get(name)):
            self._events += 1
            worker = self.known[name] = Worker(name, counted_as or name, task, self._events)
        stood = worker.busy_with
        if worker.end:  # a task has another handle, or somebody had removed the outbox of a process that lives
            worker.end = 0
            self._ended.pop(name, None)
        if open_step := self.open.get(step):
            is_again = name in open_step.reports and stood != step
            if is_again or open_step.first_death < worker.birth or open_step.tasks.get(task, name) != name:
                self._close(step)  # rule 2
        before = self._newest if worker.step < 0 else worker.step
        if step < before and not task:
            back = f"steps went back from {before} to {step}: each attempt gets rows of its own"
            self.warnings.append(("went back", back))
        if stood != step:
            self._done(worker)
        worker.regular |= worker.step not in (-1, step)
        worker.step, worker.busy_with, worker.heard = step, step, now
        worker.steps.add(step)
        self.open.setdefault(step, OpenStep()).add(worker, report_id, now)
        self._waiting += 1
        if commit:
            self._done(worker)
        self._close_complete([step] if stood == step else [stood, step], now)
        while self._waiting > self.MAX_WAITING:
            self._close(next(iter(self.open)))  # rule 4

    def end(self, name: str, now: float, died: bool = False) -> None:
        """A worker will report nothing more: it has said so, or has died."""
        if not (worker := self.known.get(name)) or worker.end:
            return
        self._done(worker)
        self._events += 1
        worker.end, worker.end_time = self._events, now
        death = self._events if died and worker.counted_as == name else math.inf
        if not worker.task and worker.counted_as == name:
            self._ended[name] = worker
        if len(self._ended) > 100 + 2 * self.workers:
            self._forget(self._ended.pop(next(iter(self._ended))))
        for step in worker.steps:
            self.open[step].first_death = min(self.open[step].first_death, death)
        self._close_complete(sorted(worker.steps), now)
        self._forget(worker)

    def expect(self, workers: int, now: float) -> None:
        self.workers = workers
        for name in [*self._ended]:
            self._forget(self._ended.pop(name))
        self._close_complete([*self.open], now)

    def tick(self, now: float) -> None:
        """To be called about once a second: rule 3, and rule 1 where somebody's ten seconds are over."""
        self._warn_of_many(len(living(self.known, regular=True)))
        self._close_complete([*self.open], now)
        slow = max(self.MINUTE, 10 * self._usual)
        heard = [worker for worker in self.known.values() if not worker.end and now - worker.heard < slow]
        for step, open_step in [*self.open.items()]:
            behind = (each for each in heard if each.step < step and each.name not in open_step.reports)
            if len(open_step.workers) >= self.workers:
                if now - open_step.heard >= self.MINUTE:
                    self._close(step)
            elif now - open_step.heard >= slow and not any(behind):
                self.warnings.append(("few workers", _few(step, open_step, self)))
                self._close(step)

    def finish(self) -> None:
        most = max((len(each.workers) for each in self.open.values()), default=self.workers)
        if self._newest < 0 and most < self.workers:  # in a short run nothing has been said before
            self.warnings.append(("few workers", f"no step had {self.workers} workers: pass workers={most}"))
        for step in sorted(self.open):
            self._close(step)  # rule 4

    def _done(self, worker: Worker) -> None:
        if (open_step := self.open.get(worker.busy_with)) and worker.name in open_step.reports:
            open_step.busy -= 1
        worker.busy_with = None

    def _close_complete(self, steps: list[int | None], now: float) -> None:
        """Rule 1, and how often a step is complete."""
        for step in steps:
            if not (open_step := self.open.get(step)) or open_step.busy:
                continue
            missing = self.workers - len(open_step.workers)
            if missing <= 0 or (missing <= len(self._ended) and missing <= self._excused(open_step, now)):
                since = 0.0 if math.isnan(self._last) else now - self._last
                self._usual, self._last = 0.8 * self._usual + 0.2 * since, now
                self._newest = max(self._newest, step)
                self._close(step)

    def _close(self, step: int) -> None:
        open_step = self.open.pop(step)
        self._waiting -= sum(map(len, open_step.reports.values()))
        if open_step.tasks:
            self._warn_of_many(len(open_step.workers))
        open_step.partial = len(open_step.workers) < self.workers
        self._newest = max(self._newest, -1 if open_step.partial else step)
        self.over.append((step, open_step))
        for name in open_step.reports:
            self.known[name].steps.discard(step)
            self._forget(self.known[name])

    def _forget(self, worker: Worker) -> None:
        """Whoever has ended, and is of no further use."""
        if worker.end and not worker.steps and worker.name not in self._ended:
            self.known.pop(worker.name, None)

    def _excused(self, open_step: OpenStep, now: float) -> int:
        """How many of the ended it does not wait for: they ended ten seconds ago, while one that reported it lived."""
        if open_step.tasks:
            return 0
        births = (self.known[name].birth for name in open_step.reports if not self.known[name].end)
        first_birth = min(births, default=math.inf)
        ended = [each for name, each in self._ended.items() if each.end > first_birth and name not in open_step.reports]
        return min(sum(now - each.end_time >= self.GRACE for each in ended), self.workers - len(living(self.known)))

    def _warn_of_many(self, n: int) -> None:
        if n > max(self.workers, self._warned_of):
            self._warned_of = n
            told = f"{n} workers log to a pipeline that was told of {self.workers}: pass workers={n}"
            self.warnings.append(("many workers", told))


def _few(step: int, open_step: OpenStep, steps: Steps) -> str:
    """What is said of a row that the clock has made."""
    n, silent = len(open_step.workers), [name for name in steps.known if name not in open_step.reports]
    of = f"; nothing was heard of {', '.join(silent[:3])}{' and others' if silent[3:] else ''}" if silent else ""
    return f"step {step} stands on {n} of {steps.workers} workers{of}: pass workers={n} if no more log"


def living(known: dict[str, Worker], regular: bool = False) -> set[str]:
    """The workers that live, without tasks, children as their parents. regular: those of more than one step."""
    return {each.counted_as for each in known.values() if not each.end and not each.task and each.regular >= regular}
