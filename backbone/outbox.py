"""A process's outbox: files to which it only appends what is logged in it. Free of Ray.

When `put` has returned, the kernel has the record, so it outlives the process, however that ends. There is no thread,
no callback and nothing to flush. Who reads the files is in reading.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from .files import CLOSED_FOLDER, Address
from .ledger import run_is_finished
from .page import CLOSED, NOBODY_READS, Page
from .records import EXIT, GOODBYE, WHO, Room, Segments, raise_from_outside, record

if TYPE_CHECKING:  # it knows of Ray
    from .process import Process

logger = logging.getLogger("wandb_run")

own: set[str] = set()  # names of this process's outboxes


class Outbox:
    """What a process has for one run: a page and segments. All copies of the handle in the process share it."""

    def __init__(self, address: Address, process: Process):
        self.address, self.process, self.copies = address, process, 0
        self.exit: tuple[int, str | None] | None = None  # an owner's: exit code and failure of the run, if it ends now
        self.is_finished = False
        self._lock = threading.RLock()  # a signal handler or a destructor may log in the middle of `put`
        self._lost: dict[int, int] = {}  # pipeline -> reports
        self._begin()

    def _begin(self) -> None:
        self._page: Page | None = None  # until something is logged
        self._segments: Segments | None = None
        self._who = ("", "")
        self._room, self._next_look = Room(), 0.0

    @property
    def is_closed(self) -> bool:
        return (page := self._page) is not None and page.state == CLOSED

    def put(self, kind: int, pipeline: int, step: int, content: bytes, label: str = "") -> None:
        """Takes a record. It waits where many are unread; a report that there is no room for is lost, and counted.

        Raises RunFinishedError, RuntimeError where the run can't be reached from this process, and what `record` does.
        """
        size, segments = len(content), self._segments  # which another thread may replace
        if segments is None:
            room = self.open()
        else:
            fits = segments.records < self._room.records and segments.bytes + size <= self._room.bytes
            room = fits or self._wait(size)
        with self._lock:
            now = time.monotonic()
            is_written = room and self._write(kind, pipeline, step, content, now, label)
            if not is_written and not self.is_closed:
                self._lose(pipeline, 1)
            # After the record: a relay that goes says so, and then reads once more, so one of them sees the other.
            if now >= self._next_look:
                self.look(now, pipeline)
        if self.is_closed:
            raise run_is_finished(self.address.name)

    def _write(self, kind: int, pipeline: int, step: int, content: bytes, now: float, label: str) -> bool:
        who, segments = (self.process.who(), label), self._segments
        if segments is None:  # the page could not be opened again
            return False
        if who != self._who:
            about = json.dumps(dict(name=who[0], label=label, task=self.process.in_task)).encode()
            if not segments.append(record(WHO, about, now), 0):
                return False
            self._who = who  # not before: an interrupt would leave reports that are taken for somebody else's
        return segments.append(record(kind, content, now, pipeline, step), 1)

    def _wait(self, size: int) -> bool:
        """Waits for the reader; whether there is room for so many bytes then."""
        while (page := self._page) and (segments := self._segments) and page.state != CLOSED:
            if (room := self._room.look(page.read, segments, size, self._folder)) is not None:
                return room
            if (now := time.monotonic()) >= self._next_look:
                self.look(now)
            time.sleep(0.002)
        return True

    def look(self, now: float, pipeline: int = 0) -> None:
        """Once a second, while something is logged, or the process's life matters: whether anybody can read it."""
        with self._lock:
            self._next_look = now + 1
            if self._page is None:
                return
            if self._page.is_removed:  # somebody has cleaned the temporary folder
                lost = max(0, self._segments.records - self._page.read[0])
                self.close()
                self._lost = {}
                self.open()
                self._lose(pipeline, lost)
            elif self._page.state == NOBODY_READS:
                try:
                    self.process.find_folder(self.address)
                except OSError as error:  # the disk is full
                    raise_from_outside(error)

    def _lose(self, pipeline: int, reports: int) -> None:
        if reports and not self._lost:
            why = "no room on the disk, or nobody reads them"
            logger.warning("run %s: reports are lost, training goes on: %s", self.address.name, why)
        self._lost[pipeline] = self._lost.get(pipeline, 0) + reports
        if self._page:
            self._page.note_lost(pipeline, self._lost[pipeline])

    def flush(self, timeout: float) -> bool:
        """Waits until all records have left this node; whether they have within so many seconds."""
        deadline = time.monotonic() + timeout
        while self._page and self._folder.parent != Path(self.address.folder) and not self.is_closed:
            with self._lock:
                if self._segments:
                    self._segments.settle()
                if not self._page or self._page.read[1] >= self._segments.bytes:
                    return True
            if (now := time.monotonic()) > deadline:
                return False
            if now >= self._next_look:
                self.look(now)
            time.sleep(0.01)
        return True

    def hand_on(self) -> None:
        """Before a copy of the handle goes to another process, which may have no Ray to tell the run where it is."""
        with contextlib.suppress(RuntimeError):  # it is finished
            if self.process.ray and not self.address.is_here and self.open():
                self._page.ask_to_stay()

    def let_go(self) -> None:
        """A copy of the handle is gone. When it was the last one, a task will log nothing more."""
        self.copies -= 1
        if not self.copies and self.process.in_task and self._who[0]:
            self._say(GOODBYE)
            self._who = ("", "")

    def say_exit(self) -> None:
        """The process ends by itself."""
        with contextlib.suppress(Exception):
            self._say(EXIT, pickle.dumps(self.exit) if self.exit else b"")

    def _say(self, kind: int, content: bytes = b"") -> None:
        with self._lock:
            if self._segments and not self.is_closed:
                self._segments.append(record(kind, content, time.monotonic()), 0)

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
                    raise_from_outside(error)
                    with contextlib.suppress(OSError):
                        self.process.find_folder(self.address)  # raises if the run is finished
                    self._next_look = time.monotonic() + 1
            return self._page is not None

    def _open(self, folder: Path, name: str) -> None:
        own.add(name)
        page = Page(folder / f"{name}.page", self.process.name, self.process.parent, self._lost)
        try:
            self._segments = Segments(lambda number: f"{folder}/{name}.{number}")
            if (folder.parent / CLOSED_FOLDER).exists():  # in which nobody looks any more
                raise run_is_finished(self.address.name)
        except BaseException:
            page.close()  # and whoever reads there finds that it has ended
            raise
        self._folder, self._page = folder, page

    def begin_in_fork(self, process: Process) -> None:
        """In a fork of the process that had it: the fork is another one, with an outbox of its own."""
        self.process, self._lost, self._lock = process, {}, threading.RLock()
        self.close()

    def close(self, finished: bool = False) -> None:
        with self._lock:
            for part in (self._page, self._segments):
                if part:
                    part.close()
            self.is_finished = finished
            self._begin()
