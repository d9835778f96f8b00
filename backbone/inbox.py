"""Takes what is read from outboxes: whose a report is, which pipeline it is for, and who has ended."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterable

from . import records
from .page import OTHER, Position, lost_by_pipeline
from .pipeline import Pipeline, Report
from .reading import Reading
from .records import Record
from .said import Said
from .state import State

HOME = ""  # the run's own place, among those that have outboxes; of others see relay.py
GONE = 1, "the process that the run belonged to is gone"  # exit code and failure of an owner that has said nothing


@dataclasses.dataclass
class Box:
    """An outbox, as far as the run knows it."""

    process: str  # whose it is
    counted_as: str  # the worker that a child process is counted as
    name: str  # of the worker that logs there now
    task: str = ""  # what all attempts of a task share, if it is one
    label: str = ""  # what that worker wants to be called
    position: Position = dataclasses.field(default_factory=Position)
    lost: dict[int, int] = dataclasses.field(default_factory=dict)  # reports, by pipeline
    exit: tuple[int, str | None] | None = None  # it ends by itself; an owner's exit code and failure
    ended: bool = False  # all of it is read. It is kept until its files are gone, or they would look like a new outbox


class Inbox:
    """The outboxes of all nodes, as far as they have been read. What changes is on the disk with the next commit.

    owner: name of the process whose end ends the run. Then the state's fact `owner_end` is its exit code and failure.
    """

    def __init__(self, state: State, pipelines: list[Pipeline], owner: str):
        self._state, self._pipelines, self._owner = state, pipelines, owner
        found = state.db.execute("SELECT * FROM outboxes").fetchall()
        self.boxes: dict[tuple[str, str], Box] = {(place, name): pickle.loads(box) for place, name, box in found}
        self.said = Said(state)
        self.clock: float = state.facts.get("clock", 0.0)  # of the steps, in seconds

    def positions(self, place: str) -> dict[str, Position]:
        """How far the outboxes of a place have been read."""
        return {name: box.position for (where, name), box in self.boxes.items() if where == place}

    @property
    def places(self) -> frozenset[str]:
        """Other ones than the run's own, which somebody has told of, and that are not read to their end."""
        return self._state.facts.get("places", frozenset())

    def know(self, places: Iterable[str]) -> None:
        """There may be outboxes: whoever finishes the run without them names these places."""
        if not self.places.issuperset(places):
            self._state.note(places=self.places.union(places))

    def take(self, place: str, reading: Reading) -> None:
        """Takes what is new in a place. The reading before must have been committed by its reader."""
        if reading.is_last or reading.has_left:
            self._state.note(places=self.places - {place})
        # An outbox that ended in an earlier reading is forgotten, unless this reading names it again: then an actor had
        # saved that end, and died before it removed the files.
        again = {(place, record.outbox) for record in reading.records}
        for key in [key for key, box in self.boxes.items() if key[0] == place and box.ended and key not in again]:
            del self.boxes[key]
            self._state.do("DELETE FROM outboxes WHERE place = ? AND name = ?", *key)
        for record in reading.records:
            box = self.boxes.get((place, record.outbox))
            if record.kind == records.BEGUN:
                about = json.loads(record.content)
                self.boxes[place, record.outbox] = Box(about["name"], about["counted_as"], about["name"])
            elif box:
                self._take_record(box, record)
        for name, end in {record.outbox: record.end for record in reading.records}.items():
            if box := self.boxes.get((place, name)):
                box.position = end
                self._state.do("INSERT OR REPLACE INTO outboxes VALUES (?, ?, ?)", place, name, pickle.dumps(box))

    def _take_record(self, box: Box, record: Record) -> None:
        if record.kind in (records.REPORT, records.COMMIT):
            report = Report(record.wall_time, box.label or box.name, record.content)
            is_last = record.kind == records.COMMIT
            pipeline = self._pipelines[record.pipeline]
            pipeline.log(report, box.name, record.step, is_last, self.clock, box.counted_as, box.task)
        elif record.kind == records.WHO:
            now = json.loads(record.content)
            if box.task and box.name != now["name"]:
                self._end(box.name)
            box.name, box.label, box.task = now["name"], now["label"], now["task"]
        elif record.kind == records.SAID:
            self.said.take(box.label or box.name, record.wall_time, record.content)
        elif record.kind == records.EXPECT:
            self._pipelines[record.pipeline].steps.expect(record.step, self.clock)
        elif record.kind == records.GOODBYE:
            self._end(box.name)
        elif record.kind == records.EXIT:
            box.exit = pickle.loads(record.content) if record.content else (0, None)
            if box.process == self._owner and record.content:  # its lock may stay: it can live on, without Ray
                self._state.note(owner_end=box.exit)
        elif record.kind == records.ENDED:
            self._close(box)
            if box.process == self._owner:
                self._state.note(owner_end=box.exit or GONE)
        elif record.kind == records.VANISHED and not box.ended:
            self._state.unheard(f"{box.process}: somebody has removed its outbox, or there was no room for one")
            self._close(box)
        elif record.kind == records.LOST:
            before, box.lost = box.lost, lost_by_pipeline(record.content)
            if OTHER in box.lost and OTHER not in before:
                self._state.unheard(f"{box.process}: there was no room for alerts, config, log lines or the like")
            for pipeline in self._pipelines:
                # They count as reports that are in no row. So the ledger says that they are lost.
                number = pipeline.number
                pipeline.counts["reports"] += box.lost.get(number, 0) - before.get(number, 0)

    def _end(self, worker: str, died: bool = False) -> None:
        for pipeline in self._pipelines:
            pipeline.steps.end(worker, self.clock, died)

    def _close(self, box: Box) -> None:
        """Its process is gone, and all is read that it has left."""
        box.ended = True
        self._end(box.name, died=not box.exit)

    def place_is_gone(self, place: str, why: str) -> None:
        """Gives it up: its workers have ended. why: something may be missing there, so the ledger names it."""
        if why:
            self._state.unheard(f"node {place[:6]}: {why}")
        self._state.note(places=self.places - {place})
        for key in [key for key in self.boxes if key[0] == place]:
            self._close(self.boxes.pop(key))
            self._state.do("DELETE FROM outboxes WHERE place = ? AND name = ?", *key)
