"""Reads the outboxes of a node. Free of Ray.

What is new there is a list of records in the order of time. Besides what processes have put into their outboxes it says
when an outbox begins, when reports were lost in it, and when it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from . import outbox
from .files import CLOSED, OUTBOXES, fcntl
from .outbox import RECORD


class Position(NamedTuple):
    """How far an outbox has been read."""

    segment: int = 0
    offset: int = 0
    records: int = 0
    bytes: int = 0


class Record(NamedTuple):
    """Something that has happened in an outbox. kind: see outbox.py."""

    time: float  # monotonic
    outbox: str
    kind: int
    pipeline: int
    step: int
    wall_time: float
    content: bytes
    end: Position


class Reading(NamedTuple):
    """What is new. `Reader.commit` is to be called when it is safe."""

    records: list[Record]  # in the order of time
    is_cut: bool = False  # there is more to read
    is_last: bool = False  # of a relay: it has nothing more

    @property
    def is_empty(self) -> bool:
        return not self.records and not self.is_cut


class Reader:
    """Reads the outboxes below a run's private folder on this node.

    positions: of the outboxes that have been read before.
    """

    LIMIT: ClassVar = 1 << 20  # bytes of a reading, about: whoever waits for room must not wait long

    def __init__(self, private: Path, positions: dict[str, Position]):
        self._private, self._state = private, outbox.IS_READ
        self._folder = private / (CLOSED if (private / CLOSED).exists() else OUTBOXES)
        self._boxes = dict(positions)
        self._first = {name: position.segment for name, position in positions.items()}  # segments that are there
        self._lost: dict[str, bytes] = {}  # by outbox
        self._dying: set[str] = set()  # their lock is free
        self.stays: set[str] = (
            set()
        )  # those of processes that can't tell the run of this place, or may have such children
        self._changed, self._next_look, self._next_touch = 0, 0.0, 0.0

    def read(self, look: bool = False) -> Reading:
        """What has come since the last reading.

        look: at each page, whether its process lives; that is done now and then anyway.
        """
        before, found = dict(self._boxes), list[Record]()
        if look := look or self._has_new_pages() or time.monotonic() >= self._next_look:
            self._look(found)
            self._next_look = time.monotonic() + max(0.1, len(self._boxes) / 1000)
        news = [name for name in self._boxes if self._has_news(name, found)]
        share, horizon = max(1 << 12, self.LIMIT // max(1, len(news))), math.inf
        for name in news:
            records, is_cut = self._read_box(name, share)
            horizon = min(horizon, records[-1].time) if is_cut else horizon
            found += records
        # Where an outbox was cut off, nothing later is handed on from the others: else two epochs could get mixed.
        found = [record for record in found if record.time <= horizon]
        if not look and any(record.kind == outbox.WHO for record in found):
            self._boxes = before
            return self.read(look=True)  # who begins may take the place of one who has just died
        self._boxes |= {record.outbox: record.end for record in found}
        last = {record.outbox: record.time for record in found}
        for name in self._dying if horizon == math.inf else ():
            # As early as it can have been: an attempt of a worker must not share a row with the next one.
            found.append(Record(last.get(name, 0.0), name, outbox.ENDED, 0, 0, 0.0, b"", self._boxes[name]))
        return Reading(sorted(found, key=lambda record: record.time), horizon < math.inf)

    def _has_news(self, name: str, found: list[Record]) -> bool:
        segment, offset, *_ = self._boxes[name]
        try:
            size = os.stat(self._path(name, segment)).st_size
        except FileNotFoundError:
            if not os.path.exists(self._path(name, "page")) and name not in self._dying:
                found.append(Record(0.0, name, outbox.VANISHED, 0, 0, 0.0, b"", self._boxes[name]))
            return False
        return size > offset or (size >= outbox.SEGMENT and os.path.exists(self._path(name, segment + 1)))

    def _read_box(self, name: str, share: int) -> tuple[list[Record], bool]:
        """The next records of an outbox, as many as its share of bytes allows, or one; whether there are more."""
        records: list[Record] = []
        segment, offset, count, total = self._boxes[name]
        latest = 0.0
        while True:
            # To be seen before this segment is read to its end.
            has_next = offset + share >= outbox.SEGMENT and os.path.exists(self._path(name, segment + 1))
            content, is_cut = self._content(name, segment, offset, share)
            share -= len(content)
            for length, (_, kind, pipeline, step, at, wall_time), body in parse(content):
                offset, total, latest = offset + length, total + length, max(latest, at)
                count += kind in outbox.COUNTED
                end = Position(segment, offset, count, total)
                records.append(Record(latest, name, kind, pipeline, step, wall_time, body, end))
            if is_cut or not has_next or share <= 0:
                return records, bool(records) and (is_cut or has_next)
            segment, offset = segment + 1, 0

    def _content(self, name: str, segment: int, offset: int, share: int) -> tuple[bytes, bool]:
        """What a segment has from `offset` on, and whether there is more of it."""
        with open(self._path(name, segment), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size - offset
            content = os.pread(file.fileno(), min(size, share), offset)
            if RECORD.size <= len(content) < size:
                first = RECORD.size + RECORD.unpack_from(content)[0]
                if len(content) < first <= size:  # it is larger than the share
                    content = os.pread(file.fileno(), first, offset)
            return content, len(content) < size

    def _path(self, name: str, end: str | int) -> str:
        return f"{self._folder}/{name}.{end}"

    # Pages

    def _has_new_pages(self) -> bool:
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return False
        if changed == self._changed:
            return False
        # The time that a folder has is coarse, so it is looked at again a little later.
        self._changed = changed if time.time_ns() - changed > 100_000_000 else 0
        return any(name not in self._boxes for name in self._names())

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            pages = [entry.name[:-5] for entry in os.scandir(self._folder) if entry.name.endswith(".page")]
            return [name for name in pages if name not in outbox.own]  # to open and close one's own would free its lock
        return []

    def _look(self, found: list[Record]) -> None:
        """At each page: whether it is new, what was lost, and whether the process lives."""
        for name in self._names():
            with contextlib.suppress(FileNotFoundError), open(self._path(name, "page"), "r+b", buffering=0) as file:
                page = file.read(outbox.PAGE)
                if name not in self._boxes:  # where a state was lost, it has been read to some place before
                    self._boxes[name] = Position(*outbox.READ.unpack_from(page)[1:])
                    about = page[outbox.ABOUT_AT :]
                    found.append(Record(0.0, name, outbox.BEGUN, 0, 0, 0.0, about, self._boxes[name]))
                if page[0] != self._state:
                    os.pwrite(file.fileno(), bytes([self._state]), 0)
                lost = page[outbox.LOST_AT : outbox.ABOUT_AT]
                if lost != self._lost.get(name, outbox.NOTHING_LOST):
                    self._lost[name] = lost
                    found.append(Record(0.0, name, outbox.LOST, 0, 0, 0.0, lost, self._boxes[name]))
                if page[outbox.STAYS_AT]:
                    self.stays.add(name)
                if fcntl:
                    with contextlib.suppress(OSError):
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self._dying.add(name)
        if time.monotonic() > self._next_touch:  # some systems clean their temporary folder of what is old
            self._next_touch = time.monotonic() + 3600
            for path in (self._private, *self._private.rglob("*")):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def set_state(self, state: int) -> None:
        """Tells all who log here."""
        self._state = state
        for name in self._names():
            self._write(name, bytes([state]))

    def _write(self, name: str, content: bytes) -> None:
        with contextlib.suppress(FileNotFoundError), open(self._path(name, "page"), "r+b", buffering=0) as file:
            file.write(content)

    def commit(self, reading: Reading) -> None:
        """Notes how far has been read, and removes what is of no further use."""
        ended = {record.outbox for record in reading.records if record.kind in (outbox.ENDED, outbox.VANISHED)}
        for name, end in {record.outbox: record.end for record in reading.records}.items():
            last = end.segment + (name in ended)
            for segment in range(self._first.get(name, 0), last):
                _remove(self._path(name, segment))
            self._first[name] = last
            if name not in ended:
                self._write(name, outbox.READ.pack(self._state, *end))
                continue
            _remove(self._path(name, "page"))
            for known in (self._boxes, self._first, self._lost):
                known.pop(name, None)
            self._dying.discard(name)
            self.stays.discard(name)

    @property
    def is_closed(self) -> bool:
        return self._folder.name == CLOSED

    def close(self) -> None:
        """Whoever logs here from now on is told that the run is finished; what was logged before can be read."""
        with contextlib.suppress(OSError):
            (self._private / OUTBOXES).rename(self._private / CLOSED)
        self._folder, self._changed, self._next_look = self._private / CLOSED, 0, 0.0
        self.set_state(outbox.CLOSED)


def parse(content: bytes) -> Iterator[tuple[int, tuple, bytes]]:
    """The whole records in `content`: the length of each, its head, its content."""
    position = 0
    while position + RECORD.size <= len(content):
        head = RECORD.unpack_from(content, position)
        begin, position = position, position + RECORD.size + head[0]
        if position > len(content):
            return
        yield position - begin, head, content[position - head[0] : position]


def lost_by_pipeline(content: bytes) -> dict[int, int]:
    return {i: n for i, (n,) in enumerate(struct.iter_unpack("<Q", content)) if n}


def lives(private: Path, process: str) -> bool:
    """Whether the process of this name, which has an outbox in a run's private folder, is alive."""
    for page in private.glob("*/*.page"):
        try:
            with page.open("r+b", buffering=0) as file:
                if json.loads(file.read()[outbox.ABOUT_AT :])["name"] != process:
                    continue
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return not fcntl  # on Windows nobody notices
        except FileNotFoundError:
            continue
        except OSError:  # it has the lock
            return True
    return False


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.truncate(path, 0)  # a fork of the process may have it open
        os.unlink(path)
