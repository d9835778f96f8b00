"""Reads the outboxes of a node. Free of Ray.

What is new there is a list of records in the order of time. Besides what processes have put into their outboxes it says
when an outbox begins, when reports were lost in it, and when it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

from . import page, records
from .files import CLOSED_FOLDER, OUTBOXES
from .page import Position
from .records import HEAD, Record


class Reading(NamedTuple):
    """What is new. `Reader.commit` is to be called when it is safe."""

    records: list[Record]  # in the order of time
    is_cut: bool = False  # there is more to read
    is_last: bool = False  # of a relay: it has nothing more, and nobody logs there any more
    has_left: bool = False  # of a relay: it has nothing for now, so it goes

    @property
    def is_empty(self) -> bool:
        return not self.records and not self.is_cut


class Reader:
    """Reads the outboxes below a run's private folder on this node.

    positions: of the outboxes that have been read before.
    """

    LIMIT: ClassVar = 1 << 20  # bytes of a reading, about: whoever waits for room must not wait long

    def __init__(self, private: Path, positions: dict[str, Position]):
        self._private, self._state = private, page.IS_READ
        self._folder = private / (CLOSED_FOLDER if (private / CLOSED_FOLDER).exists() else OUTBOXES)
        self._boxes = dict(positions)
        self._first = {name: position.segment for name, position in positions.items()}  # segments that are there
        self._lost: dict[str, bytes] = {}  # by outbox
        self._dying: set[str] = set()  # their process has ended
        self.stays: set[str] = set()  # whose relay must stay, see `records.Files`
        self._changed, self._next_look, self._next_touch = 0, 0.0, 0.0

    def read(self, look: bool = False) -> Reading:
        """What has come since the last reading. look: at each page, which is done now and then anyway."""
        before, found = dict(self._boxes), list[Record]()
        looks = look or self._has_new_pages() or time.monotonic() >= self._next_look
        if looks:
            self._look(found)
            self._next_look = time.monotonic() + max(0.1, len(self._boxes) / 1000)
        found, behind = self._read_boxes(found)
        if not looks and any(record.kind == records.WHO for record in found):
            # It may take the place of one that has just died, whose end must come first: look, and read again.
            self._boxes = before
            return self.read(look=True)
        self._boxes |= {record.outbox: record.end for record in found}
        last = {record.outbox: record.time for record in found}
        # An end comes right behind the last record: later, the successor's first report would come before it.
        found += [self._event(records.ENDED, name, last.get(name, 0.0)) for name in self._dying - behind]
        return Reading(sorted(found, key=lambda record: record.time), is_cut=bool(behind))

    def _read_boxes(self, found: list[Record]) -> tuple[list[Record], set[str]]:
        """These records, and the new ones of all outboxes, as many as one reading may have; which of them have more.

        Where an outbox is cut off, nothing later is handed on from the others: else reports of one step would come in
        two readings, with another attempt at that step between them.
        """
        has_news = {name: self._has_news(name) for name in self._boxes}
        found += [self._event(records.VANISHED, name) for name, has in has_news.items() if has is None]
        news = [name for name, has in has_news.items() if has]
        share, cut = max(1 << 12, self.LIMIT // max(1, len(news))), dict[str, float]()  # at what time
        for name in news:
            new, is_cut = self._read_box(name, share)
            cut |= {name: new[-1].time} if is_cut else {}
            found += new
        horizon = min(cut.values(), default=math.inf)
        late = {record.outbox for record in found if record.time > horizon}
        return [record for record in found if record.time <= horizon], late | cut.keys()

    def _event(self, kind: int, name: str, at: float = 0.0, content: bytes = b"") -> Record:
        return Record(at, name, kind, 0, 0, 0.0, content, self._boxes[name])  # without a time, before all records

    def _has_news(self, name: str) -> bool | None:
        """None where somebody has removed it."""
        segment, offset, *_ = self._boxes[name]
        try:
            size = os.stat(self._path(name, segment)).st_size
        except FileNotFoundError:
            return None
        return size > offset or (size >= records.SEGMENT and os.path.exists(self._path(name, segment + 1)))

    def _read_box(self, name: str, share: int) -> tuple[list[Record], bool]:
        """The next records of an outbox, as many as its share of bytes allows, or one; whether there are more."""
        found: list[Record] = []
        segment, offset, count, total = self._boxes[name]
        latest = 0.0
        while True:
            # To be seen before this segment is read to its end.
            has_next = offset + share >= records.SEGMENT and os.path.exists(self._path(name, segment + 1))
            content, is_cut = _content(self._path(name, segment), offset, share)
            share -= len(content)
            for length, (_, kind, pipeline, step, at, wall_time), body in records.parse(content):
                offset, total, latest = offset + length, total + length, max(latest, at)
                count += kind in records.COUNTED
                end = Position(segment, offset, count, total)
                found.append(Record(latest, name, kind, pipeline, step, wall_time, body, end))
            if is_cut or not has_next or share <= 0:
                return found, bool(found) and (is_cut or has_next)
            segment, offset = segment + 1, 0

    def _path(self, name: str, end: str | int) -> str:
        return f"{self._folder}/{name}.{end}"

    # Pages

    def _has_new_pages(self) -> bool:
        """To be known before anything that was logged later is handed on, such as the end of a new process's parent."""
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return False
        if changed == self._changed:
            return False
        # The time that a folder has is coarse, so it is looked at again a little later.
        self._changed = changed if time.time_ns() - changed > 100_000_000 else 0
        return any(name not in self._boxes for name in self._names())

    def _names(self, end: str = ".page") -> list[str]:
        """Not those of this process: to open and close a page of one's own would free its lock."""
        with contextlib.suppress(FileNotFoundError):
            found = [name[:-5] for name in os.listdir(self._folder) if name.endswith(end)]
            return [name for name in found if name not in records.own]
        return []

    def _look(self, found: list[Record]) -> None:
        """At each page: whether it is new, what was lost, and whether the process lives."""
        for name in self._names():
            seen = page.see(self._path(name, "page"), self._state)
            if seen and name not in self._boxes:  # where a state was lost, it has been read to some place before
                self._boxes[name] = seen.position
                found.append(self._event(records.BEGUN, name, content=seen.about))
            if seen and seen.lost != self._lost.get(name, page.NOTHING_LOST):
                self._lost[name] = seen.lost
                found.append(self._event(records.LOST, name, content=seen.lost))
            if seen and seen.stays:
                self.stays.add(name)
            if seen and not seen.is_alive:
                self._dying.add(name)
        for name in self._names(".lost"):  # of a process that had no room for an outbox: it is as if it had had one
            if name not in self._boxes:
                self._boxes[name] = Position()
                about = json.dumps(dict(name=os.readlink(self._path(name, "lost")), parent="")).encode()
                found.append(self._event(records.BEGUN, name, content=about))
        if time.monotonic() > self._next_touch:  # some systems clean their temporary folder of what is old
            self._next_touch = time.monotonic() + 3600
            _touch(self._private)

    def set_state(self, state: int) -> None:
        """Tells all who log here."""
        self._state = state
        for name in self._names():
            page.see(self._path(name, "page"), state)

    def commit(self, reading: Reading) -> None:
        """Notes how far has been read, and removes what is of no further use."""
        ended = {record.outbox for record in reading.records if record.kind in (records.ENDED, records.VANISHED)}
        for name, end in {record.outbox: record.end for record in reading.records}.items():
            last = end.segment + (name in ended)
            for segment in range(self._first.get(name, 0), last):
                _remove(self._path(name, segment))
            self._first[name] = last
            page.note_read(self._path(name, "page"), self._state, end)
            if name not in ended:
                continue
            for file in (self._path(name, "page"), self._path(name, "lost")):
                with contextlib.suppress(OSError):
                    os.unlink(file)  # not cut: its process may have it mapped
            for known in (self._boxes, self._first, self._lost):
                known.pop(name, None)
            self._dying.discard(name)
            self.stays.discard(name)

    @property
    def is_closed(self) -> bool:
        return self._folder.name == CLOSED_FOLDER

    def close(self) -> None:
        """Whoever logs here from now on is told that the run is finished; what was logged before can be read."""
        self.set_state(page.CLOSED)  # before the folder moves, where an outbox could not begin its next segment
        if not self.is_closed:
            with contextlib.suppress(OSError):
                (self._private / OUTBOXES).mkdir(exist_ok=True)  # if somebody has removed it
                (self._private / OUTBOXES).rename(self._private / CLOSED_FOLDER)
        self._folder, self._changed, self._next_look = self._private / CLOSED_FOLDER, 0, 0.0
        self.set_state(page.CLOSED)  # for those that have begun in between


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.truncate(path, 0)  # a fork of the process may have it open
        os.unlink(path)


def _content(path: str, offset: int, share: int) -> tuple[bytes, bool]:
    """What a segment has from `offset` on, as much as the share allows, or one record; whether there is more of it."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - offset
        content = os.pread(file.fileno(), min(size, share), offset)
        if HEAD.size <= len(content) < size:
            first = HEAD.size + HEAD.unpack_from(content)[0]
            if len(content) < first <= size:  # it is larger than the share
                content = os.pread(file.fileno(), first, offset)
        return content, len(content) < size


def _touch(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)
