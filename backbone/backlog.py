"""What of a process's reports the pipeline actor has not answered: those that wait, and the batches under way.

Free of Ray and of threads: whoever uses it has a lock.
"""

from __future__ import annotations

import time
import uuid
from typing import ClassVar

from .inbox import Batch, Item
from .steps import is_task


class Backlog:
    """Reports in the order in which they were put, made into batches."""

    BATCH, UNDER_WAY = 128, 4  # reports in a batch, and batches without an answer
    LIMIT, LIMIT_BYTES = 512, 32 << 20  # of all that is in here
    MINUTE: ClassVar = 60.0

    def __init__(self, prefix: str, process: tuple[str, int], worker: str):
        self._prefix, self._process, self._id = prefix, process, uuid.uuid4().hex
        self._worker, self._by_default = worker, worker  # who logs
        self.waiting: list[Item] = []
        self.under_way: dict[int, tuple[int, int]] = {}  # serial -> reports and bytes of a batch
        self.reports = self._bytes = 0
        self.said = self.serial = 0  # reports so far, with those that found no room; the next batch's number
        self.last_sent = False  # the actor has been told that there is no more
        self.moved = 0.0  # when an answer came, or this was empty

    @property
    def is_full(self) -> bool:
        """For more batches to be under way."""
        return len(self.under_way) >= self.UNDER_WAY

    def has_room(self, size: int) -> bool:
        return not self.reports or (self.reports < self.LIMIT and self._bytes + size <= self.LIMIT_BYTES)

    @property
    def patience(self) -> float:
        """So many seconds more may somebody wait for room."""
        return max(0.0, self.moved + self.MINUTE - time.monotonic())

    def put(self, step: int, commit: bool, metrics: bytes) -> None:
        if not self.reports:
            self.moved = time.monotonic()
        self.waiting.append((self._worker, step, commit, metrics))
        self.said += 1
        self.reports += 1
        self._bytes += len(metrics)
        self.last_sent = False

    def begin_task(self, task: str) -> None:
        """A task that logs in this process takes the place of the one before."""
        if task and task != self._worker:
            self._say_goodbye(self.waiting)
            self._worker = task

    @property
    def of_task(self) -> bool:
        return is_task(self._worker)

    def _say_goodbye(self, items: list[Item]) -> None:
        if self.of_task:
            items.append((self._worker, None, False, b""))

    def next_batch(self, leaving: bool, may_end: bool) -> Batch:
        """leaving: nobody here has a copy of the run any more; may_end: the process can end behind this batch."""
        items, rest = self.waiting[: self.BATCH], self.waiting[self.BATCH :]
        reports, size = sum(item[1] is not None for item in items), sum(len(item[3]) for item in items)
        serial, self.serial = self.serial, self.serial + 1
        oldest = min(self.under_way, default=serial)
        self.under_way[serial] = reports, size  # before it leaves what waits: `Outbox.release` looks without a lock
        self.waiting, self.last_sent = rest, (leaving or may_end) and not rest
        if leaving and self.last_sent:
            self._say_goodbye(items)
            self._worker = self._by_default
        return Batch(self._prefix, self._id, self._process, serial, oldest, self.said, self.last_sent, items)

    def answered(self, serial: int) -> int:
        """How many reports a batch had that is not under way any more."""
        reports, size = self.under_way.pop(serial)
        self.reports -= reports
        self._bytes -= size
        self.moved = time.monotonic()
        return reports

    def drop(self) -> int:
        """Forgets the reports that wait; how many they are."""
        lost = sum(item[1] is not None for item in self.waiting)
        self.waiting.clear()
        self.reports -= lost
        return lost
