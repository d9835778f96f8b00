"""A run with its pipelines: what is read from outboxes becomes rows, is given to W&B and accounted for.

Without Ray, so that whoever finds what a dead actor has left goes on by the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import outbox
from .artifacts import Artifacts
from .files import Address, state_path
from .ledger import Ledger, Ledgers, line
from .pipeline import Pipeline, Report
from .reading import Position, Reader, Reading, Record
from .reduction import Reduction
from .state import Row, State
from .writer import Writer

DEATHS = 3  # of a pipeline actor in a row; after more it is given up
HOME = ""  # the run's own node, among those that have outboxes
GONE = 1, "the process that the run belonged to is gone"


class GivenUpError(RuntimeError):
    """The pipeline actor dies whenever it goes on."""


class Started(NamedTuple):
    """What the owner of a run learns of it."""

    ledger: Ledger
    config: dict[str, Any]
    project: str
    pipeline: int  # number of the pipeline that has joined


@dataclasses.dataclass
class Box:
    """An outbox, as far as the run knows it."""

    process: str  # whose it is
    parent: str  # the worker that a child process is counted as
    name: str  # of the worker that logs there now
    task: bool = False
    label: str = ""  # what that worker wants to be called
    position: Position = dataclasses.field(default_factory=Position)
    lost: dict[int, int] = dataclasses.field(default_factory=dict)  # reports, by pipeline
    exit: tuple[int, str | None] | None = None  # it ends by itself; an owner's exit code and failure


class Run:
    """A run as it is in a state, with the outboxes at home and the writer.

    owner: name of the process whose end ends the run. lock: whoever has it may call this. stop: see `Writer`.
    """

    def __init__(
        self,
        state: State,
        init: dict[str, Any],
        address: Address,
        owner: str,
        lock: threading.Condition | threading.RLock,
        stop: Callable[[], None] | None = None,
    ):
        self.state, self.address, self._owner, self._lock = state, address, owner, lock
        self.pipelines = Pipeline.all(state)
        found = state.db.execute("SELECT * FROM outboxes").fetchall()
        self.boxes: dict[tuple[str, str], Box] = {(node, name): pickle.loads(box) for node, name, box in found}
        self.reader = Reader(address.folder, self.positions(HOME))
        self.writer = Writer(state, init, stop)
        self.artifacts: Artifacts = None  # until `start`
        self.owner_end: tuple[int, str | None] | None = None  # exit code and failure, when the owner has ended
        self.paused = False  # the clock: a node does not answer
        self._clock, self._read_at, self._ticked = state.facts.get("clock", 0.0), time.monotonic(), 0.0
        self._held: list[tuple[str, Reading]] = []  # readings that are not safe yet
        self._rows: list[Row] = []  # that W&B has not got, for the same reason

    @classmethod
    def open(
        cls,
        init: dict[str, Any],
        address: Address,
        owner: str,
        lock: threading.Condition | threading.RLock,
        stop: Callable[[], None] | None = None,
    ) -> Run:
        """Opens what an actor before this one has left of the run, if there was one, and counts the restart.

        Raises GivenUpError after some deaths of actors without a row in between.
        """
        folder = Path(init["dir"], "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        state = State(state_path(folder, init["id"]))
        before = state.facts.get("address")
        if before and before.nonce != address.nonce and "ledgers" in state.facts:  # an earlier run, which is finished
            state.remove()
            state = State(state.path)
            before = None
        run = cls(state, init, before or address, owner, lock, stop)
        if not before:
            run._begin(address)
        elif before.nonce == address.nonce:
            rows, facts = run.writer.rows, state.facts
            deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
            state.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
            if deaths > DEATHS:
                raise GivenUpError(f"given up: the pipeline actor died {deaths} times without a row in between")
        else:  # that of an earlier process, which did not finish it
            run.read_to_end(time.monotonic() + 10)
            run.end(run.pipelines, time.monotonic() + 10)
            run._leave()
            run = cls(state, init, address, owner, lock, stop)
            run._begin(address)
        return run

    def _begin(self, address: Address) -> None:
        self.state.note(address=address, deaths=0)
        lost = address.folder / "pipelines"
        if lost.exists():  # it is the state of this very run that was there
            self.unheard("the time before the run's state was lost")
            for prefix, reduction, workers in pickle.loads(lost.read_bytes()):
                self._add(prefix, reduction, workers)

    def _leave(self) -> None:
        """Forgets the outboxes of an earlier life."""
        for node in {node for node, _ in self.boxes if node != HOME}:
            self.node_is_gone(node, "the run's earlier life had outboxes there")
        self.state.do("DELETE FROM outboxes")
        self.state.commit()
        shutil.rmtree(self.address.folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it with W&B, or goes on, unless it is finished."""
        if "ledgers" not in self.state.facts:
            try:
                self.writer.start([pipeline.prefix for pipeline in self.pipelines])
                self.state.commit()
            except Exception:
                left = self.pipelines or self.state.facts.get("restarts")  # by an actor that died
                self.state.close() if left else self.state.remove()
                raise
        self.artifacts = Artifacts(self.state, self.writer, self._lock)

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline, or goes on with it."""
        pipeline = self.pipeline(prefix)
        if not pipeline:
            self.writer.define(prefix, [other.prefix for other in self.pipelines])
            pipeline = self._add(prefix, reduction, workers)
        pipeline.begin(reduction, workers, self.writer.totals(prefix))
        self._save()
        known = [(each.prefix, each.reduction, each.steps.workers) for each in self.pipelines]
        (self.address.folder / "pipelines").write_bytes(pickle.dumps(known))
        run = self.writer.run
        return Started(self.ledger(pipeline), dict(run.config), run.project, pipeline.number)

    def _add(self, prefix: str, reduction: Reduction, workers: int) -> Pipeline:
        self.pipelines.append(Pipeline(self.state, len(self.pipelines), prefix, reduction, workers))
        return self.pipelines[-1]

    def pipeline(self, prefix: str) -> Pipeline | None:
        return next((pipeline for pipeline in self.pipelines if pipeline.prefix == prefix), None)

    def positions(self, node: str) -> dict[str, Position]:
        """How far the outboxes of a node have been read."""
        return {name: box.position for (where, name), box in self.boxes.items() if where == node}

    # Reading

    def read(self, brought: Sequence[tuple[str, Reading]] = (), look: bool = False) -> list[tuple[str, Reading]]:
        """Reads the outboxes at home once, takes what relays have brought from other nodes, and gives rows to W&B.

        look: see `Reader.read`. Returns the readings that are safe now. Raises sqlite3.Error where the disk is full;
        then the same readings are waited for, and nothing new is read. Raises ServiceDiedError if wandb-core is dead.
        """
        if not self.paused:
            self._clock += min(1.0, time.monotonic() - self._read_at)  # at most: the process may have been stopped
        brought = [*([] if self._held else [(HOME, self.reader.read(look))]), *brought]
        for node, reading in brought:
            self._take(node, reading)
        self._held += brought
        if self._clock - self._ticked >= 1 and not any(reading.is_cut for _, reading in self._held):
            self._ticked = self._clock
            for pipeline in self.pipelines:
                pipeline.steps.tick(self._clock)
            arrived = self.writer.look()
            self.state.arrived(arrived if self.state.facts.get("mode") != "online" else ())
        if self._ticked == self._clock or not all(reading.is_empty for _, reading in self._held):
            self._save()
        done, self._held = self._held, []
        self._read_at = time.monotonic()
        return done

    def _take(self, node: str, reading: Reading) -> None:
        for name, about in reading.about.items():
            self.boxes.setdefault((node, name), Box(about["name"], about["parent"], about["name"]))
        for name, lost in reading.lost.items():
            box = self.boxes[node, name]
            for pipeline in self.pipelines:
                pipeline.counts["reports"] += lost.get(pipeline.number, 0) - box.lost.get(pipeline.number, 0)
            box.lost = lost
        for record in reading.records:
            self._take_record(node, record)
        for name in {*reading.about, *reading.positions, *reading.lost}:
            if box := self.boxes.get((node, name)):  # it has not ended
                box.position = reading.positions.get(name, box.position)
                self.state.do("INSERT OR REPLACE INTO outboxes VALUES (?, ?, ?)", node, name, pickle.dumps(box))
        for name in reading.vanished:
            self.unheard(f"{self.boxes[node, name].process}: somebody has removed its outbox")
            self._forget(node, name)

    def _take_record(self, node: str, record: Record) -> None:
        box = self.boxes[node, record.outbox]
        if record.kind in (outbox.REPORT, outbox.COMMIT):
            report = Report(record.wall_time, box.label or box.name, record.content)
            who = box.name, record.step, record.kind == outbox.COMMIT, self._clock, box.parent, box.task
            self.pipelines[record.pipeline].log(report, *who)
        elif record.kind == outbox.WHO:
            now = json.loads(record.content)
            if box.task and box.name != now["name"]:
                self._end(box.name)
            box.name, box.label, box.task = now["name"], now["label"], now["task"]
        elif record.kind == outbox.GOODBYE:
            self._end(box.name)
        elif record.kind == outbox.EXIT:
            box.exit = pickle.loads(record.content) if record.content else (0, None)
            if box.process == self._owner and record.content:  # it may live on, without Ray
                self.owner_end = box.exit
        elif record.kind == outbox.ENDED:
            self._forget(node, record.outbox)

    def _end(self, worker: str, died: bool = False) -> None:
        for pipeline in self.pipelines:
            pipeline.steps.end(worker, self._clock, died)

    def _forget(self, node: str, name: str) -> None:
        """The process of an outbox is gone, and all is read that it has left."""
        box = self.boxes.pop((node, name))
        self._end(box.name, died=not box.exit)
        if box.process == self._owner:
            self.owner_end = box.exit or GONE
        self.state.do("DELETE FROM outboxes WHERE node = ? AND name = ?", node, name)

    def node_is_gone(self, node: str, why: str) -> None:
        """What was not brought from it can't be read any more."""
        self.unheard(f"node {node[:6]}: {why}")
        for name in self.positions(node):
            self._forget(node, name)

    def unheard(self, what: str) -> None:
        """There may be reports that nobody can read."""
        self.state.note(unheard=[*self.state.facts.get("unheard", ()), what])
        self.state.warn(f"unheard {what}", f"reports may be missing of {what}")

    def _save(self) -> None:
        """Commits what has changed, then gives rows to W&B."""
        for pipeline in self.pipelines:
            self._rows += pipeline.rows()
            pipeline.save()
        self.state.note(clock=self._clock)
        self.state.commit()
        for pipeline in self.pipelines:
            pipeline.saved()
        for _, reading in [held for held in self._held if held[0] == HOME]:
            self.reader.commit(reading)
        rows, self._rows = self._rows, []
        for row in rows if self.writer.run else ():  # else they are logged at its start
            self.writer.log(row)
        if self.state.facts.get("mode") == "disabled":
            self.state.arrived(row.number for row in rows)

    def expect(self, prefix: str, workers: int) -> None:
        self.pipeline(prefix).steps.expect(workers, self._clock)
        with contextlib.suppress(sqlite3.Error):
            self._save()

    # The end

    def read_to_end(self, deadline: float) -> None:
        """Closes the outboxes at home: nothing more is taken there, and what is there is read."""
        self.reader.close()
        self._until(deadline, lambda: any(not r.is_empty or r.is_cut for _, r in self.read(look=True)))

    def end(self, pipelines: Sequence[Pipeline], deadline: float) -> None:
        """Closes all steps of pipelines with the reports that came."""
        for pipeline in pipelines:
            pipeline.steps.finish()
        self._until(deadline, self._save)

    def _until(self, deadline: float, call: Callable[[], object]) -> None:
        """Repeats it as long as it says so, or the disk is full."""
        while True:
            try:
                if not call():
                    return
            except sqlite3.Error as error:
                if time.monotonic() > deadline:
                    return self.state.warn("disk", f"{line(error)}: what could not be written is lost")
                time.sleep(0.1)

    def finish(self, exit_code: int, failure: str | None, deadline: float) -> Ledgers:
        """Finishes it with W&B, when its pipelines have ended.

        Must be called without the lock, which the artifacts need. Raises ServiceDiedError if wandb-core is dead.
        """
        self.artifacts.finish(deadline)
        with self._lock:
            if "ledgers" not in self.state.facts:
                self.writer.finish(exit_code, failure, deadline)
                self.conclude()
            return self.state.facts["ledgers"]

    def conclude(self) -> None:
        """Makes the ledgers. They stay in the state until they have arrived."""
        deadline = time.monotonic() + 3
        while True:
            self.writer.look()
            ledgers = {pipeline.prefix: self.ledger(pipeline, final=True) for pipeline in self.pipelines}
            lost = sum(account.lost for account in ledgers.values())
            if not lost or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # a wandb-core that could not be waited for may still be writing
        if lost:
            self.state.warn("lost", f"{lost} reports are in no row")
        for account in ledgers.values():
            account.warnings = self.state.warnings
        self.state.note(ledgers=ledgers)
        with contextlib.suppress(sqlite3.Error):
            self.state.commit()

    def ledger(self, pipeline: Pipeline, final: bool = False) -> Ledger:
        """A pipeline's account: so far, or at the end, when it is known which rows are there."""
        facts, counts = self.state.facts, pipeline.counts
        known = ("name", "id", "mode", "url", "restarts", "uploaded", "lost_artifacts", "unheard")
        account = Ledger(**{"name": "", "id": ""} | {field: facts[field] for field in known if field in facts})
        account.paths = [*map(Path, facts.get("paths", ()))]
        account.prefix, account.warnings = pipeline.prefix, self.state.warnings
        for field in ("reports", "rows", "partial", "lost_values"):
            setattr(account, field, counts[field])
        if final:
            is_there = self.writer.there()
            found = [row for number, row in self.state.account(pipeline.number).items() if is_there(number)]
            account.rows, account.lost = len(found), account.reports - sum(reports for reports, _ in found)
            account.lost_values += sum(refused for _, refused in found)
        return account
