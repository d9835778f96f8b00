"""What an outbox consists of: a page, and segments of records to which one process only appends."""

from __future__ import annotations

import json
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .page import CLOSED, Backpressure, Page, Position, is_from_outside, leave_note
from .values import encodable

if TYPE_CHECKING:  # it knows of Ray
    from .process import Process

# The head of a record: length of its content, kind, number of the pipeline, step, and when it was made (monotonic clock
# and wall clock).
HEAD = struct.Struct("<IBB2xqdd")
REPORT, COMMIT = 0, 1  # metrics; COMMIT: and the worker is done with the step
WHO = 2  # who logs from here on
GOODBYE = 3  # that worker will log nothing more
EXIT = 4  # the process ends by itself; an owner's has exit code and failure
SAID = 5  # anything else that a worker says, see said.py
EXPECT = 6  # how many workers make a step complete from here on; that number is where the step would be
COUNTED = (REPORT, COMMIT, SAID, EXPECT)
# What only a reader says: an outbox is new (with who it is); reports were lost (see the page); its process has ended;
# somebody has removed it.
BEGUN, LOST, ENDED, VANISHED = 100, 101, 102, 103

SEGMENT = 1 << 20  # bytes, after which the next one begins
LARGEST = 900 << 20  # bytes of a record's content, or of a row: SQLite takes 1 GB at most


class Record(NamedTuple):
    """Something that has happened in an outbox, as it is read."""

    time: float  # monotonic
    outbox: str
    kind: int
    pipeline: int
    step: int
    wall_time: float
    content: bytes
    end: Position


def record(kind: int, content: bytes, now: float, pipeline: int = 0, step: int = 0) -> bytes:
    """now: on the monotonic clock. Raises ValueError for content that a run can't keep."""
    if len(content) > LARGEST:
        raise ValueError(f"{len(content) >> 20} MB at once are too much, at most {LARGEST >> 20} can be logged")
    return HEAD.pack(len(content), kind, pipeline, step, now, time.time()) + content


def parse(content: bytes) -> Iterator[tuple[int, tuple, bytes]]:
    """The whole records in `content`: the length of each, its head, its content."""
    position = 0
    while position + HEAD.size <= len(content):
        head = HEAD.unpack_from(content, position)
        begin, position = position, position + HEAD.size + head[0]
        if position > len(content):
            return
        yield position - begin, head, content[position - head[0] : position]


class Segments:
    """The segments that a process writes.

    In the middle of `append` a signal handler or a destructor may run, and append as well, or raise. Then `records` and
    `bytes` may be wrong. So each write sets a mark before it, and clears it when the counts are right. A call that
    finds a mark counts the records in the file anew. Python runs handlers only after a call, so lines that have none
    between them can't be torn apart.

    path: of a segment by its number.
    """

    def __init__(self, path: Callable[[int], str]):
        self._path = path
        self.records = self.bytes = 0  # whole ones, in all segments
        self._doubt: object | None = None  # a mark of its own for each write that may not have ended
        self._segment: tuple[int, int, int, int] | None = None  # number, file, records and bytes before it
        self._open(0, 0, 0)

    def _open(self, number: int, records: int, size: int) -> None:
        segment = number, os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), records, size
        before, self._segment = self._segment, segment
        if before:
            os.close(before[1])

    def append(self, record: bytes, counts: int) -> bool:
        """Writes a record whole or not at all; whether it could be written. counts: 1 for what is counted, else 0."""
        try:
            self.settle()
            number, _, _, begin = self._segment
            if (size := self.bytes) - begin >= SEGMENT:
                self._open(number + 1, self.records, size)
            mark = self._doubt = object()
            written = os.write(self._segment[1], record)
            if written == len(record):
                self.records, self.bytes = self.records + counts, self.bytes + written
                # Where another call came in between, its counts have just been overwritten, so they stay in doubt.
                self._doubt = None if self._doubt is mark else mark
                return True
            self.settle()  # now: behind half a record nobody would find the next one
        except OSError as error:
            if is_from_outside(error):
                raise
        return False

    def settle(self) -> None:
        """Finds out what was written, and takes back a record that was cut."""
        while self._doubt:
            mark = self._doubt = object()
            _, file, records, begin = self._segment
            try:
                content = os.pread(file, os.fstat(file).st_size, 0)
            except OSError as error:
                if error.errno is None or self._doubt is mark:
                    raise
                continue  # a signal handler has begun the next segment, and closed this one
            whole = [*parse(content)]
            size = sum(length for length, _, _ in whole)
            count = sum(head[1] in COUNTED for _, head, _ in whole)
            if size < len(content) and self._doubt is mark:
                os.ftruncate(file, size)
            self.records, self.bytes = records + count, begin + size
            self._doubt = None if self._doubt is mark else mark

    @property
    def are_removed(self) -> bool:
        """Whether somebody has removed the one that is written."""
        return os.fstat(self._segment[1]).st_nlink == 0

    def close(self) -> None:
        os.close(self._segment[1])

    def remove(self) -> None:
        """Closes and removes the first one, to which nothing was written."""
        self.close()
        os.unlink(self._path(0))


class OpenFiles:
    """The files of an outbox, as long as they are open."""

    def __init__(self, folder: Path, process: Process, lost: Mapping[int, int]):
        name = uuid.uuid4().hex
        self.folder, self.process, self.backpressure = folder, process, Backpressure()
        self.who = ("", "")  # name and label of the worker that has logged last
        self.pipeline = 0  # to which
        self.segments = Segments(lambda number: f"{folder}/{name}.{number}")
        try:
            # A relay leaves when it is idle, unless a page asks it to stay. An actor's page asks, because only a relay
            # notices its death, and so does that of a process without Ray, which could not ask for another relay. A
            # process for plain tasks does not ask: Ray keeps it idle for long, and it can ask for a relay later.
            self.page = Page(folder / f"{name}.page", process.name, process.counted_as, lost, stays=not process.in_task)
        except BaseException:
            self.segments.remove()
            raise

    @classmethod
    def made(cls, folder: Path, process: Process, lost: Mapping[int, int]) -> OpenFiles | None:
        """None where there is no room for them, of which a link in the folder tells the reader."""
        try:
            return cls(folder, process, lost)
        except OSError as error:
            if is_from_outside(error):
                raise
            if folder.exists() and not lost:  # else there is one already: it has been tried before
                leave_note(folder, process.name)
            return None

    @property
    def is_closed(self) -> bool:
        """Whether the reader takes nothing more."""
        return self.page.state == CLOSED

    @property
    def is_read(self) -> bool:
        """Whether the reader has all that was written."""
        self.segments.settle()
        return self.page.read[1] >= self.segments.bytes

    def may_write(self, size: int) -> bool | None:
        """Whether so many bytes may be written; None: not now, but the reader may get on."""
        segments, limits = self.segments, self.backpressure
        if segments.records < limits.records and segments.bytes + size <= limits.bytes:
            return True  # as most often; this is quicker
        return limits.check(self.page.read, (segments.records, segments.bytes), size, self.folder)

    def write(self, kind: int, pipeline: int, step: int, content: bytes, now: float, label: str) -> bool:
        """Whether the record could be written."""
        if (who := (self.process.who(), label)) != self.who:
            about = json.dumps(dict(name=who[0], label=encodable(label), task=self.process.task)).encode()
            if not self.segments.append(record(WHO, about, now), 0):
                return False
            self.who = who  # not before: an interrupt would leave reports that are taken for somebody else's
        self.pipeline = pipeline
        return self.segments.append(record(kind, content, now, pipeline, step), 1)

    def close(self) -> None:
        self.page.close()
        self.segments.close()
