"""Reads the outboxes of a node. Free of Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
    """What somebody has put into an outbox."""

    time: float  # monotonic
    outbox: str
    kind: int
    pipeline: int
    step: int
    wall_time: float
    content: bytes
    end: Position


@dataclasses.dataclass
class Reading:
    """What is new in the outboxes of a node. `Reader.commit` is to be called when it is safe."""

    records: list[Record] = dataclasses.field(default_factory=list)  # in the order of time
    about: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # new outboxes, and who they are
    positions: dict[str, Position] = dataclasses.field(default_factory=dict)  # to which outboxes have been read
    lost: dict[str, dict[int, int]] = dataclasses.field(default_factory=dict)  # outbox -> lost reports by pipeline
    ended: list[str] = dataclasses.field(default_factory=list)  # outboxes whose process is gone, read to their end
    vanished: list[str] = dataclasses.field(default_factory=list)  # outboxes that somebody has removed
    is_cut: bool = False  # there is more to read
    leaving: bool = False  # a relay goes, and has brought all

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.about or self.lost or self.ended or self.vanished or self.leaving)


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
        self._lost: dict[str, dict[int, int]] = {}
        self._dying: set[str] = set()  # their lock is free, and what they have left is not read yet
        self.stays: set[str] = (
            set()
        )  # those of processes that can't tell the run of this place, or may have such children
        self._changed, self._next_look, self._next_touch = 0, 0.0, 0.0

    # Reading

    def read(self, look: bool = False) -> Reading:
        """What has come since the last reading, in the order of time, as far as all of it has been read.

        look: at each page, whether its process lives; that is done now and then anyway.
        """
        reading, before = Reading(), dict(self._boxes)
        if look := look or self._has_new_pages() or time.monotonic() >= self._next_look:
            self._look(reading)
            self._next_look = time.monotonic() + max(0.1, len(self._boxes) / 1000)
        news = [name for name in self._boxes if self._has_news(name, reading)]
        share, horizon, found = max(1 << 12, self.LIMIT // max(1, len(news))), math.inf, []
        for name in news:
            records, is_cut = self._read_box(name, share)
            found += records
            if is_cut:
                horizon, reading.is_cut = min(horizon, records[-1].time), True
        # Where an outbox was cut off, nothing later is handed on from the others: else two epochs could get mixed.
        found = [record for record in found if record.time <= horizon]
        if not look and any(record.kind == outbox.WHO for record in found):
            self._boxes = before
            return self.read(look=True)  # who begins may take the place of one who has just died
        reading.positions = {record.outbox: record.end for record in found}
        self._boxes |= reading.positions
        reading.ended = [] if reading.is_cut else [*self._dying]
        last = {record.outbox: record.time for record in found}
        for name in reading.ended:  # as early as it can have been: an attempt must not share a row with the next one
            found.append(Record(last.get(name, 0.0), name, outbox.ENDED, 0, 0, 0.0, b"", self._boxes[name]))
        reading.records = sorted(found, key=lambda record: record.time)
        return reading

    def _has_news(self, name: str, reading: Reading) -> bool:
        segment, offset, *_ = self._boxes[name]
        try:
            size = os.stat(self._path(name, segment)).st_size
        except FileNotFoundError:
            if not os.path.exists(self._path(name, "page")) and name not in self._dying:
                reading.vanished.append(name)
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
                count += kind not in (outbox.WHO, outbox.GOODBYE, outbox.EXIT)
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
        return any(name not in self._boxes for name in self.names)

    @property
    def names(self) -> list[str]:
        """The outboxes that are there."""
        with contextlib.suppress(FileNotFoundError):
            pages = [
                entry.name.removesuffix(".page") for entry in os.scandir(self._folder) if entry.name[-5:] == ".page"
            ]
            return [name for name in pages if name not in outbox.own]  # to open and close one's own would free its lock
        return []

    def _look(self, reading: Reading) -> None:
        """At each page: who it is, what was lost, and whether the process lives."""
        for name in self.names:
            with contextlib.suppress(FileNotFoundError), open(self._path(name, "page"), "r+b", buffering=0) as file:
                page = file.read(outbox.PAGE)
                if name not in self._boxes:
                    # Where a state was lost, an outbox begins with what was not read before.
                    self._boxes[name] = Position(*outbox.READ.unpack_from(page)[1:])
                    reading.about[name] = json.loads(page[outbox.ABOUT_AT :])
                if page[0] != self._state:
                    os.pwrite(file.fileno(), bytes([self._state]), 0)
                if page.count(0, outbox.LOST_AT, outbox.ABOUT_AT) < outbox.ABOUT_AT - outbox.LOST_AT:
                    lost = {i: n for i, n in enumerate(struct.unpack_from("<256Q", page, outbox.LOST_AT)) if n}
                    if lost != self._lost.get(name):
                        self._lost[name] = reading.lost[name] = lost
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
        for name in self.names:
            with contextlib.suppress(FileNotFoundError), open(self._path(name, "page"), "r+b", buffering=0) as file:
                file.write(bytes([state]))

    def commit(self, reading: Reading) -> None:
        """Notes how far has been read, and removes what is of no further use."""
        for name, position in reading.positions.items():
            with contextlib.suppress(FileNotFoundError), open(self._path(name, "page"), "r+b", buffering=0) as file:
                file.write(outbox.READ.pack(self._state, *position))
            for segment in range(self._first.get(name, 0), position.segment):
                _remove(self._path(name, segment))
            self._first[name] = position.segment
        for name in (*reading.ended, *reading.vanished):
            last = self._boxes.pop(name, Position()).segment
            for end in (*range(self._first.pop(name, 0), last + 1), "page"):
                _remove(self._path(name, end))
            self._lost.pop(name, None)
            self._dying.discard(name)
            self.stays.discard(name)

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


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.truncate(path, 0)  # a fork of the process may have it open
        os.unlink(path)


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
