"""A process's outbox: files to which it only appends what is logged in it. Free of Ray.

When `put` has returned, the kernel has the record, so it outlives the process, however that ends. There is no thread,
no callback and nothing to flush. Who reads the files is in relay.py.

An outbox has a *page* and *segments*. The page says who logs there, and is locked as long as the process lives. It also
has what was lost, and, written by the reader, how far it has read. The segments hold the records, one after the other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import pickle
import struct
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .files import CLOSED as CLOSED_FOLDER
from .files import Address, disk_is_full, fcntl
from .ledger import run_is_finished

if TYPE_CHECKING:  # it knows of Ray
    from .process import Process

logger = logging.getLogger("wandb_run")

# A record: length of its content, kind, number of the pipeline, step, when it was logged (monotonic, and wall clock).
RECORD = struct.Struct("<IBB2xqdd")
REPORT, COMMIT = 0, 1  # metrics; COMMIT: and the worker is done with the step
WHO = 2  # who logs from here on
GOODBYE = 3  # that worker will log nothing more
EXIT = 4  # the process ends by itself; an owner's has exit code and failure
SAID = 5  # anything else that a worker says, see said.py
COUNTED = (REPORT, COMMIT, SAID)
# What only a reader says: an outbox is new (with who it is); reports were lost (see the page); its process has ended;
# somebody has removed it.
BEGUN, LOST, ENDED, VANISHED = 100, 101, 102, 103

# The page: what the reader writes, whether the reader should stay, the lost reports of each pipeline, who it is (JSON).
PAGE, STAYS_AT, LOST_AT, ABOUT_AT = 4096, 56, 64, 64 + 8 * 256
READ = struct.Struct("<B7xQQQQ")  # state; segment and offset to which it has been read; records and bytes so far
NOBODY_READS, IS_READ, CLOSED = 0, 1, 2
NOTHING_LOST = bytes(8 * 256)
SEGMENT = 1 << 20  # bytes, after which the next one begins


own: set[str] = set()  # outboxes of this process


class Outbox:
    """What a process has for one run. All copies of the handle in the process share it."""

    LIMIT, LIMIT_BYTES = 4096, 32 << 20  # unread records and bytes with which `put` waits for the reader
    BACKLOG: ClassVar = 1 << 30  # unread bytes where the reader doesn't get on
    PATIENCE: ClassVar = 5.0  # seconds for a reader that doesn't get on

    def __init__(self, address: Address, process: Process):
        self.address, self.process, self.copies = address, process, 0
        self.exit: tuple[int, str | None] | None = None  # what an owner's end is to be taken for
        self.is_finished = False
        self._lock = threading.RLock()  # a signal handler or a destructor may log in the middle of `put`
        self._lost: dict[int, int] = {}  # pipeline -> reports
        self._begin()

    def _begin(self) -> None:
        self._page, self._page_file, self._segment_file, self._segment = None, -1, -1, 0
        self._who = ("", "")
        self._unsure: int | None = None  # where a write began that may not have come to its end
        self._records = self._bytes = 0  # written
        self._room, self._room_bytes, self._next_look = self.LIMIT, self.LIMIT_BYTES, 0.0
        self._stuck: tuple[int, int] | None = None  # how far the reader was when it was waited for in vain

    @property
    def is_closed(self) -> bool:
        return self._page is not None and self._page[0] == CLOSED

    def put(self, kind: int, pipeline: int, step: int, content: bytes, label: str = "") -> None:
        """Takes a record. It waits where many are unread; a report that there is no room for is lost, and counted.

        Raises RunFinishedError, and RuntimeError where the run can't be reached from this process.
        """
        room = self._page is not None or self.open()
        if room and (self._records >= self._room or self._bytes + len(content) > self._room_bytes):
            room = self._waits_for_room(len(content))
        with self._lock:
            now = time.monotonic()
            if not (room and self._write(kind, pipeline, step, content, now, label)) and kind <= COMMIT:
                self._lose(pipeline, 1)
            if now >= self._next_look:  # behind the record: a relay that goes says so, and then reads once more
                self._look(now, pipeline)
        if self.is_closed:
            raise run_is_finished(self.address.name)

    def _write(self, kind: int, pipeline: int, step: int, content: bytes, now: float, label: str) -> bool:
        who = self.process.who(), label
        if who != self._who:
            about = json.dumps(dict(name=who[0], label=label, task=self.process.in_task)).encode()
            if not self._append(RECORD.pack(len(about), WHO, 0, 0, now, time.time()) + about):
                return False
            self._who = who  # not before: an interrupt would leave reports that are taken for somebody else's
        return self._append(RECORD.pack(len(content), kind, pipeline, step, now, time.time()) + content, 1)

    def _append(self, record: bytes, reports: int = 0) -> bool:
        """Writes a record whole or not at all; whether there was room."""
        if self._page is None:  # it could not be opened again
            return False
        if self._unsure is not None:  # an exception came out of the middle of this
            self._settle(self._unsure)
        start = self._unsure = os.lseek(self._segment_file, 0, os.SEEK_END)
        try:
            if start >= SEGMENT:
                self._open_segment(self._segment + 1)
                start = self._unsure = 0
            written = os.write(self._segment_file, record)
        except OSError as error:
            _raise_from_outside(error)
            written = 0
        if written == len(record):
            if self._unsure is not None:  # else a signal handler has logged in between, and counted this one, too
                self._unsure, self._records, self._bytes = None, self._records + reports, self._bytes + written
            return True
        self._settle(start)
        return False

    def _settle(self, start: int) -> None:
        """Counts the whole records behind `start`, and takes back what is none: nobody could read beyond it."""
        end, records = start, 0
        try:
            content = self._path(self._segment).read_bytes()
            while end + RECORD.size <= len(content):
                length, kind, *_ = RECORD.unpack_from(content, end)
                if end + RECORD.size + length > len(content):
                    break
                end, records = end + RECORD.size + length, records + (kind in COUNTED)
            if end < len(content):
                os.ftruncate(self._segment_file, end)
        except OSError as error:
            _raise_from_outside(error)
        self._unsure, self._records, self._bytes = None, self._records + records, self._bytes + end - start

    def _waits_for_room(self, size: int) -> bool:
        """Whether there is room for so many bytes, maybe when the reader has got on."""
        before, deadline = None, 0.0
        while (page := self._page) is not None and not self.is_closed:
            read = READ.unpack_from(page)[3:]
            unread, now = self._bytes - read[1], time.monotonic()
            if self._records - read[0] < self.LIMIT and (not unread or unread + size <= self.LIMIT_BYTES):
                self._room, self._room_bytes = read[0] + self.LIMIT, read[1] + self.LIMIT_BYTES
                return True
            if read == self._stuck:
                return unread + size <= self.BACKLOG and not disk_is_full(self._folder)
            if read != before:
                before, deadline = read, now + self.PATIENCE
            elif now > deadline:
                self._stuck = read
            if now >= self._next_look:
                self._look(now)
            time.sleep(0.002)
        return True

    def look(self) -> None:
        """As `put` does, for a process whose life matters though it may log nothing for long."""
        with self._lock, contextlib.suppress(RuntimeError):  # the run is finished
            self._look(time.monotonic())

    def _look(self, now: float, pipeline: int = 0) -> None:
        """Once a second, while something is logged: whether anybody can read it."""
        self._next_look = now + 1
        if self._page is None:
            return
        if os.fstat(self._page_file).st_nlink == 0:  # somebody has cleaned the temporary folder
            lost = max(0, self._records - READ.unpack_from(self._page)[3])
            self.close()
            self._lost = {}
            self.open()
            self._lose(pipeline, lost)
        elif self._page[0] == NOBODY_READS:
            self.process.find_folder(self.address)

    def _lose(self, pipeline: int, reports: int) -> None:
        if reports and not self._lost:
            why = "no room on the disk, or nobody reads them"
            logger.warning("run %s: reports are lost, training goes on: %s", self.address.name, why)
        self._lost[pipeline] = self._lost.get(pipeline, 0) + reports
        if self._page is not None:
            os.pwrite(self._page_file, struct.pack("<Q", self._lost[pipeline]), LOST_AT + 8 * pipeline)

    def flush(self, timeout: float) -> bool:
        """Waits until all records have left this node; whether they have within so many seconds."""
        deadline = time.monotonic() + timeout
        while self._page is not None and self._folder.parent != Path(self.address.folder) and not self.is_closed:
            if READ.unpack_from(self._page)[4] >= self._bytes:
                return True
            if time.monotonic() > deadline:
                return False
            if time.monotonic() >= self._next_look:
                self._look(time.monotonic())
            time.sleep(0.01)
        return True

    def hand_on(self) -> None:
        """Before a copy of the handle goes to another process, which may have no Ray to tell the run where it is."""
        with contextlib.suppress(RuntimeError):  # it is finished
            if self.process.ray and not self.address.is_here and self.open():
                os.pwrite(self._page_file, b"\1", STAYS_AT)

    def let_go(self) -> None:
        """A copy of the handle is gone. When it was the last one, a task will log nothing more."""
        self.copies -= 1
        if not self.copies and self.process.in_task and self._who[0] and self._page and not self.is_closed:
            with self._lock:
                self._append(RECORD.pack(0, GOODBYE, 0, 0, time.monotonic(), time.time()))
                self._who = ("", "")

    def say_exit(self) -> None:
        if self._page is not None and not self.is_closed:
            with self._lock, contextlib.suppress(Exception):
                content = pickle.dumps(self.exit) if self.exit else b""
                self._append(RECORD.pack(len(content), EXIT, 0, 0, time.monotonic(), time.time()) + content)

    # Opening

    def open(self) -> bool:
        """Opens it, unless that has been tried in vain within a second; whether it is open."""
        if self.is_finished:
            raise run_is_finished(self.address.name)
        with self._lock:
            if self._page is None and time.monotonic() >= self._next_look:
                try:
                    self._open(self.process.find_folder(self.address), uuid.uuid4().hex)
                except OSError as error:  # the disk is full, or the folder has just been removed
                    _raise_from_outside(error)
                    with contextlib.suppress(OSError):
                        self.process.find_folder(self.address)  # raises if the run is finished
                    self._next_look = time.monotonic() + 1
            return self._page is not None

    def _open(self, folder: Path, name: str) -> None:
        self._folder, self._name, hidden = folder, name, folder / f".{name}"
        file = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            about = json.dumps(self.process.about()).encode().ljust(PAGE - ABOUT_AT)
            lost = b"".join(struct.pack("<Q", self._lost.get(pipeline, 0)) for pipeline in range(256))
            if os.write(file, READ.pack(NOBODY_READS, 0, 0, 0, 0).ljust(LOST_AT, b"\0") + lost + about) != PAGE:
                raise OSError(errno.ENOSPC, "no room for a page")
            page = mmap.mmap(file, PAGE, access=mmap.ACCESS_READ)  # all of it has been written: a gap could be a SIGBUS
            if fcntl:  # before others see it, or a reader could take this process for dead
                fcntl.lockf(file, fcntl.LOCK_EX)
            own.add(name)
            hidden.rename(self._path("page"))
            self._open_segment(0)
            if (folder.parent / CLOSED_FOLDER).exists():  # in which nobody looks any more
                raise run_is_finished(self.address.name)
        except BaseException:
            os.close(file)
            hidden.unlink(missing_ok=True)
            raise
        self._page_file, self._page = file, page

    def _open_segment(self, number: int) -> None:
        try:
            file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except FileNotFoundError:
            self.process.find_folder(self.address)  # raises if the run is finished
            raise
        before, self._segment_file, self._segment = self._segment_file, file, number
        if before >= 0:
            os.close(before)

    def _path(self, end: str | int) -> Path:
        return self._folder / f"{self._name}.{end}"

    def begin_in_fork(self, process: Process) -> None:
        """In a fork of the process that had it: the fork is another one, with an outbox of its own."""
        self.process, self._lost, self._lock = process, {}, threading.RLock()
        self.close()

    def close(self, finished: bool = False) -> None:
        with self._lock:
            for file in (self._page_file, self._segment_file):
                if file >= 0:
                    os.close(file)
            self.is_finished = finished
            self._begin()


def _raise_from_outside(error: OSError) -> None:
    """Raises what is none of the system's: a signal handler's TimeoutError is an OSError, too."""
    if error.errno is None:
        raise error
