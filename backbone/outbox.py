"""A process's outbox: files to which it only appends what is logged in it. Free of Ray.

When `put` has returned, the kernel has the record, so it outlives the process, however that ends. There is no thread,
no callback and nothing to flush. Who reads the files is in reading.py.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .files import CLOSED_FOLDER, Address
from .ledger import RunFinishedError, run_is_finished
from .page import NOBODY_READS, OTHER, is_from_outside
from .records import COMMIT, EXIT, GOODBYE, REPORT, OpenFiles, record

if TYPE_CHECKING:  # it knows of Ray
    from .process import Process

logger = logging.getLogger("wandb_run")
LOSING = "reports are lost, training goes on: no room on the disk, or nobody reads them"


class Outbox:
    """What a process has for one run. All copies of the handle in the process share it."""

    def __init__(self, address: Address, process: Process):
        self.address, self.process, self.copies = address, process, 0
        self.exit: tuple[int, str | None] | None = None  # an owner's: exit code and failure of the run, if it ends now
        self.is_finished = False
        self._lock = threading.RLock()  # a signal handler or a destructor may log in the middle of `put`
        self._lost: dict[int, int] = {}  # pipeline -> reports
        self._files: OpenFiles | None = None  # until something is logged
        self._next_look = 0.0

    @property
    def is_closed(self) -> bool:
        return (files := self._files) is not None and files.is_closed

    def put(self, kind: int, pipeline: int, step: int, content: bytes, label: str = "") -> bool:
        """Appends a record. Returns whether it was written; if not, it is lost, and counted. Waits if many are unread.

        Raises RunFinishedError, RuntimeError where the run can't be reached from this process, and what `record` does.
        """
        if self.is_finished:
            raise run_is_finished(self.address.name)
        may_write = self._may_write(len(content))
        with self._lock:
            now, files = time.monotonic(), self._files  # another thread may have replaced them
            is_written = files.write(kind, pipeline, step, content, now, label) if may_write and files else False
            if not is_written and not (self.is_finished or self.is_closed):
                self._lose(pipeline if kind in (REPORT, COMMIT) else OTHER, 1)
            # Only after the record is written: a relay that goes marks the page first, and then reads once more. So
            # either it finds this record, or this finds its mark.
            if now >= self._next_look:
                self.keep_reachable(now)
        if self.is_finished or self.is_closed:
            self.is_finished = True  # the next call raises at once
            raise run_is_finished(self.address.name)
        return is_written

    def _may_write(self, size: int) -> bool:
        """Opens the files, or waits for the reader, where that is necessary. Returns whether there is room then."""
        if not (files := self._files):
            return self.open()
        while (may_write := files.may_write(size)) is None and not files.is_closed and not self.is_finished:
            self.keep_reachable(time.monotonic())
            time.sleep(0.002)
            files = self._files or files
        return may_write is not False

    def keep_reachable(self, now: float) -> None:
        """Once a second: opens it anew if somebody has removed it, and tells the run of it if nobody reads it."""
        with self._lock:
            if now < self._next_look or not (files := self._files):
                return
            self._next_look = now + 1
            if files.page.is_removed or files.segments.are_removed:  # somebody has cleaned the temporary folder
                lost = files.segments.records - files.page.read[0]
                self.close()
                self.open()
                if lost > 0:
                    self._lose(files.pipeline, lost)
            elif files.page.state == NOBODY_READS:
                self._find_folder()

    def _find_folder(self) -> Path | None:
        """Tells the run of it where that is necessary. Nothing where that is not possible now. Raises as `put` does."""
        try:
            return self.process.find_folder(self.address)
        except RunFinishedError:
            self.is_finished = self.process.ray is not None  # else its parent may tell the run of it later
            raise
        except OSError as error:  # the disk is full, or the folder has just been removed
            if is_from_outside(error):
                raise

    def _lose(self, pipeline: int, reports: int) -> None:
        if not self._lost:
            logger.warning("run %s: %s", self.address.name, LOSING)
        self._lost[pipeline] = self._lost.get(pipeline, 0) + reports
        if self._files:
            self._files.page.note_lost(pipeline, self._lost[pipeline])

    def flush(self, timeout: float) -> bool:
        """Waits until all records have left this node; whether they have within so many seconds."""
        deadline = time.monotonic() + timeout
        while not (has_left := self._has_left()) and (now := time.monotonic()) < deadline:
            self.keep_reachable(now)
            time.sleep(0.01)
        return has_left

    def _has_left(self) -> bool:
        with self._lock:
            files = self._files
            return not files or files.is_closed or files.folder.parent == Path(self.address.folder) or files.is_read

    def hand_on(self) -> None:
        """Before a copy of the handle goes to another process, which may have no Ray to tell the run where it is."""
        with contextlib.suppress(RuntimeError), self._lock:  # it is finished
            if self.process.ray and not self.address.is_here and self.open():
                self._files.page.ask_to_stay()
                if self._files.page.state == NOBODY_READS:
                    self._find_folder()

    def let_go(self) -> None:
        """A copy of the handle is gone. When it was the last one, a task will log nothing more."""
        self.copies -= 1
        if not self.copies and self.process.in_task and (files := self._files) and files.who[0]:
            self._say(GOODBYE)
            files.who = ("", "")

    def say_exit(self) -> None:
        """The process ends by itself."""
        with contextlib.suppress(Exception):
            self._say(EXIT, pickle.dumps(self.exit) if self.exit else b"")

    def _say(self, kind: int, content: bytes = b"") -> None:
        with self._lock:
            if self._files and not self.is_closed:
                self._files.segments.append(record(kind, content, time.monotonic()), 0)

    def open(self) -> bool:
        """Opens it, unless that has been tried in vain within a second; whether it is open."""
        if self.is_finished:
            raise run_is_finished(self.address.name)
        with self._lock:
            if self._files is None and (now := time.monotonic()) >= self._next_look:
                self._files = self._new_files()
                self._next_look = 0.0 if self._files else now + 1
            return self._files is not None

    def _new_files(self) -> OpenFiles | None:
        """None where there is no room for them, or their folder has just been removed."""
        folder = self._find_folder()
        files = OpenFiles.made(folder, self.process, self._lost) if folder else None
        if not files:
            self._find_folder()  # raises where the run has just been finished
        elif (folder.parent / CLOSED_FOLDER).exists():  # in which nobody looks any more
            files.close()
            raise run_is_finished(self.address.name)
        return files

    def begin_in_fork(self, process: Process) -> None:
        """In a fork of the process that had it: the fork is another one, with an outbox of its own."""
        self.process, self._lock = process, threading.RLock()
        self.close()

    def close(self, finished: bool = False) -> None:
        with self._lock:
            if self._files:
                self._files.close()
            self._files, self._lost, self.is_finished, self._next_look = None, {}, finished, 0.0
