"""A run with its pipelines: what is read from outboxes becomes rows, is given to W&B and accounted for.

Without Ray, so that whoever finds what a dead actor has left goes on by the same code.
"""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import ledger
from .artifacts import Artifacts
from .files import Address, write_private
from .inbox import HOME, Inbox
from .ledger import Ledger, Ledgers, line
from .page import PIPELINES
from .pipeline import Pipeline
from .reading import Reader, Reading
from .reduction import Reduction
from .state import Row, State
from .writer import Writer


class Started(NamedTuple):
    """What the owner of a run learns of it."""

    ledger: Ledger
    config: dict[str, Any]
    project: str
    pipeline: int  # number of the pipeline that has joined


class Run:
    """A run as it is in a state, with the outboxes at home and the writer.

    owner: name of the process whose end ends the run. lock: whoever has it may call this, except for `finish`.
    """

    def __init__(self, state: State, init: dict[str, Any], address: Address, owner: str, lock: threading.RLock):
        self.state, self.address, self._lock = state, address, lock
        self.pipelines = Pipeline.all(state)
        self.inbox = Inbox(state, self.pipelines, owner)
        self.reader = Reader(address.folder, self.inbox.positions(HOME))
        self.writer = Writer(state, init)
        self.artifacts: Artifacts = None  # until `start`
        self.paused = False  # the clock: a node does not answer
        self._read_at, self._ticked = time.monotonic(), 0.0
        # What could not be committed, because the disk is full: readings, and rows that W&B has not got.
        self._held: list[tuple[str, Reading]] = []
        self._rows: list[Row] = []

    def start(self) -> None:
        """Starts it with W&B, or goes on, unless it is finished."""
        if not self.state.is_finished:
            self.writer.start([(pipeline.prefix, pipeline.reduction.best) for pipeline in self.pipelines])
            self.inbox.said.again()
            self.writer.tell(self.inbox.said)
            self.state.commit()
        self.artifacts = Artifacts(self.state, self.writer, self._lock)

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline, or goes on with it."""
        pipeline = self.pipeline(prefix)
        if not pipeline:
            self.writer.axes.define(prefix, reduction.best)
            pipeline = self.add(prefix, reduction, workers)
        pipeline.begin(reduction, workers, *self.writer.resumed(prefix))
        self._save()
        known = [(each.prefix, each.reduction, each.steps.workers) for each in self.pipelines]
        write_private(self.address.folder / "pipelines", pickle.dumps(known))
        run = self.writer.run
        return Started(ledger.account(self.state, pipeline), dict(run.config), run.project, pipeline.number)

    def add(self, prefix: str, reduction: Reduction, workers: int) -> Pipeline:
        if len(self.pipelines) == PIPELINES:
            raise ValueError(f"a run has {PIPELINES} pipelines at most")
        self.pipelines.append(Pipeline(self.state, len(self.pipelines), prefix, reduction, workers))
        return self.pipelines[-1]

    def pipeline(self, prefix: str) -> Pipeline | None:
        return next((pipeline for pipeline in self.pipelines if pipeline.prefix == prefix), None)

    # Reading

    def read(self, brought: Sequence[tuple[str, Reading]] = (), look: bool = False) -> list[tuple[str, Reading]]:
        """Reads the outboxes at home once, takes what relays have brought from other nodes, and gives rows to W&B.

        look: see `Reader.read`. Returns the readings that are safe now. Raises ServiceDiedError if wandb-core is dead,
        and sqlite3.OperationalError if the disk is full: the next call saves them before it reads on at home.
        """
        if not self._held:
            if not self.paused:  # a second at most, because this process may have been stopped
                self.inbox.clock += min(1.0, time.monotonic() - self._read_at)
            brought = [(HOME, self.reader.read(look)), *brought]
        for place, reading in brought:
            self.inbox.take(place, reading)
        self._held += brought
        ticks = self.inbox.clock - self._ticked >= 1 and not any(reading.is_cut for _, reading in self._held)
        if ticks:
            self._tick()
        if self.state.is_pending or any(each.steps.over or each.steps.warnings for each in self.pipelines):
            self._save()
        elif ticks:
            self.state.note(clock=self.inbox.clock)
            self.state.commit()
        done, self._held = self._held, []
        self._read_at = time.monotonic()
        return done

    def _tick(self) -> None:
        """Once a second."""
        self._ticked = self.inbox.clock
        for pipeline in self.pipelines:
            pipeline.steps.tick(self.inbox.clock)
        arrived = self.writer.logs.look()
        if self.state.facts.get("mode") != "online":  # there W&B has a row when the server has it
            self.state.arrived(arrived)

    def _save(self) -> None:
        """What makes a death at any moment harmless is the order.

        1. One transaction has it all: how far is read, the reports that wait, the steps, the rows and their numbers.
        2. Then the reader may remove what is read, here, and relays when they are asked for more.
        3. Then W&B gets the rows. Those that it misses after a death are in the state.
        """
        for pipeline in self.pipelines:
            self._rows += pipeline.make_rows()
            pipeline.save()
        for row in self._rows:
            self.inbox.said.forget(row.metrics)
        self.state.note(clock=self.inbox.clock)
        self.state.commit()
        for _, reading in [held for held in self._held if held[0] == HOME]:
            self.reader.acknowledge(reading)
        rows, self._rows = self._rows, []
        if self.writer.run:  # else they are logged at its start
            for row in rows:
                self.writer.log(row)
            self.writer.tell(self.inbox.said)
        if self.artifacts:
            self.artifacts.go_on()
        if self.state.facts.get("mode") == "disabled":
            self.state.arrived(row.number for row in rows)
        with contextlib.suppress(sqlite3.OperationalError):  # what fails here stays queued for the next commit
            self.state.commit()  # which increments of tables W&B has, and what it has refused

    # The end

    def read_to_end(self, deadline: float) -> None:
        """Closes the outboxes at home: nothing more is taken there, and what is there is read."""
        self.reader.close()
        while readings := self._retry_on_full_disk(lambda: self.read(look=True), deadline):
            if all(reading.is_empty for _, reading in readings):
                return

    def end(self, pipelines: Sequence[Pipeline], deadline: float) -> None:
        """Closes all steps of pipelines with the reports that came."""
        for pipeline in pipelines:
            pipeline.steps.finish()
        self._retry_on_full_disk(self._save, deadline)

    def _retry_on_full_disk(self, call: Callable[[], Any], deadline: float) -> Any:
        """Calls, and calls again while the disk is full, until `deadline`. Returns what the call returns."""
        while True:
            try:
                return call()
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    return self.state.warn("disk", f"{line(error)}: what could not be written is lost")
                time.sleep(0.1)

    def finish(self, exit_code: int, failure: str | None, deadline: float) -> Ledgers:
        """Finishes it with W&B. Whoever calls this has no lock. Raises ServiceDiedError if wandb-core is dead."""
        self.artifacts.finish(deadline)
        with self._lock:
            if not self.state.is_finished:
                summary = {key: value for pipeline in self.pipelines for key, value in pipeline.best_values().items()}
                summary["ledger"] = ledger.summary(self.state, self.pipelines)
                self.writer.finish(exit_code, failure, summary, deadline)
                ledger.conclude(self.state, self.writer, self.pipelines)
            return self.state.facts["ledgers"]
