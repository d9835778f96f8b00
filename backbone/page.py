"""An outbox's page: a small file beside the records that says who logs there. Its lock says that the process lives.

The process also counts there what was lost, and the reader writes how far it has read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from .files import disk_is_nearly_full, fcntl

PIPELINES = 256  # of a run at most: a record has one byte for the number
OTHER = PIPELINES  # stands where a pipeline's number does, for what was said besides reports
# Where on the page is what. It begins with what the reader writes.
STAYS_AT = 56  # whether a relay must stay that reads here
LOST_AT = 64  # how many reports of each pipeline were lost, and how many others
ABOUT_AT = LOST_AT + 8 * (PIPELINES + 1)  # whose it is (JSON)
SIZE = 4096
NOTHING_LOST = bytes(8 * (PIPELINES + 1))
READ = struct.Struct("<B7xQQQQ")  # state; segment and offset to which it has been read; records and bytes so far
NOBODY_READS, IS_READ, CLOSED = 0, 1, 2


class Position(NamedTuple):
    """How far an outbox has been read."""

    segment: int = 0
    offset: int = 0
    records: int = 0
    bytes: int = 0


class Page:
    """The page of an outbox of this process, which sees there what the reader writes."""

    def __init__(self, path: Path, process: str, counted_as: str, lost: Mapping[int, int], stays: bool):
        hidden = path.with_name(f".{path.stem}")
        content = b"".join(struct.pack("<Q", lost.get(pipeline, 0)) for pipeline in range(PIPELINES + 1))
        begin = READ.pack(NOBODY_READS, 0, 0, 0, 0).ljust(STAYS_AT, b"\0") + bytes([stays])
        content = begin.ljust(LOST_AT, b"\0") + content
        content += json.dumps(dict(name=process, counted_as=counted_as)).encode()
        self._pid = os.getpid()
        self._file = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(self._file, content.ljust(SIZE)) != SIZE:  # to read a gap in it would be a SIGBUS
                raise OSError(errno.ENOSPC, "no room for a page")
            self._map = mmap.mmap(self._file, SIZE, access=mmap.ACCESS_READ)
            fcntl.flock(self._file, fcntl.LOCK_EX)  # before others see it, or a reader could take this process for dead
            hidden.rename(path)
        except BaseException:
            self.close()
            hidden.unlink(missing_ok=True)
            raise

    @property
    def state(self) -> int:
        return self._map[0]

    @property
    def read(self) -> tuple[int, int]:
        """Records and bytes that have been read."""
        return READ.unpack_from(self._map)[3:]

    @property
    def is_removed(self) -> bool:
        return os.fstat(self._file).st_nlink == 0

    def note_lost(self, pipeline: int, reports: int) -> None:
        os.pwrite(self._file, struct.pack("<Q", reports), LOST_AT + 8 * pipeline)

    def ask_to_stay(self) -> None:
        os.pwrite(self._file, b"\1", STAYS_AT)

    def close(self) -> None:
        if self._pid != os.getpid():  # in a fork the map, which has a descriptor too, would keep the lock of the dead
            mapped, self._map = self._map, self._map[:]
            mapped.close()
        os.close(self._file)


class Backpressure:
    """Limits what a process may have unread: at the limit `put` waits for the reader.

    A reader that makes no progress for `PATIENCE` seconds is taken for stuck. From then on nobody waits for it, and
    only `BACKLOG` is a limit, until it makes progress again.
    """

    LIMIT, LIMIT_BYTES = 4096, 32 << 20  # unread records and bytes with which `put` waits
    PATIENCE: ClassVar = 5.0
    BACKLOG: ClassVar = 1 << 30  # unread bytes

    def __init__(self) -> None:
        self.records, self.bytes = self.LIMIT, self.LIMIT_BYTES  # up to here nobody has to look
        self._read, self._deadline = (-1, -1), 0.0  # how far the reader is, and until when it is waited for there
        self._stuck: tuple[int, int] | None = None  # where it was taken for stuck

    def check(self, read: tuple[int, int], written: tuple[int, int], size: int, folder: Path) -> bool | None:
        """Whether so many bytes may be written; None: not now, but the reader may get on.

        read, written: records and bytes.
        """
        unread, now = written[1] - read[1], time.monotonic()
        fits = not unread or unread + size <= self.LIMIT_BYTES  # one that is larger may be written alone
        if fits and written[0] - read[0] < self.LIMIT:
            self.records, self.bytes = read[0] + self.LIMIT, read[1] + self.LIMIT_BYTES
            return True
        if read == self._stuck:
            return unread + size <= self.BACKLOG and not disk_is_nearly_full(folder)
        if read != self._read:
            self._read, self._deadline = read, now + self.PATIENCE
        elif now > self._deadline:
            self._stuck = read
        return None


def leave_note(folder: Path, process: str) -> None:
    """Says that a process has no room for an outbox. A link needs neither room nor a free file descriptor."""
    try:
        os.symlink(process, folder / f"{uuid.uuid4().hex}.lost")
    except OSError as error:
        if is_from_outside(error):
            raise


def is_from_outside(error: OSError) -> bool:
    """Whether a signal handler has raised it, such as a TimeoutError: the system's own errors have a number."""
    return error.errno is None


class Seen(NamedTuple):
    """What a reader sees on the page of another process."""

    position: Position
    stays: bool
    lost: bytes  # see `lost_by_pipeline`
    about: bytes  # JSON
    is_alive: bool  # the process


def see(path: str | Path, state: int | None = None) -> Seen | None:
    """Looks at a page, and writes a new state there, if it is given. None where there is no page any more."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, for others may look at the same time
            lives = False
        except OSError:
            lives = True
        content = os.pread(file, SIZE, 0)  # only now: who has died has counted all that was lost
        if state not in (None, content[0]):
            os.pwrite(file, bytes([state]), 0)
    finally:
        os.close(file)
    _, *position = READ.unpack_from(content)
    lost, about = content[LOST_AT:ABOUT_AT], content[ABOUT_AT:]
    return Seen(Position(*position), bool(content[STAYS_AT]), lost, about, lives)


def lost_by_pipeline(lost: bytes) -> dict[int, int]:
    """Reports, by the number of their pipeline."""
    return {i: n for i, (n,) in enumerate(struct.iter_unpack("<Q", lost)) if n}


def note_read(path: str | Path, state: int, position: Position) -> None:
    with contextlib.suppress(FileNotFoundError), open(path, "r+b", buffering=0) as file:
        file.write(READ.pack(state, *position))


def is_alive(private: Path, process: str) -> bool:
    """Whether the process of this name, which has an outbox in a run's private folder, is alive."""
    for _ in range(2):  # because the reader may rename the folder of outboxes in the middle of the first look
        with contextlib.suppress(FileNotFoundError):
            pages = filter(None, map(see, private.glob("*/*.page")))
            if any(seen.is_alive and json.loads(seen.about)["name"] == process for seen in pages):
                return True
    return False
