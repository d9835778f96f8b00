"""A process's outbox: takes what its workers say, and lets go of it when the pipeline actor has it.

What waits here waits in Python, and not for ever.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import ray

from . import process
from .wire import Wire

_outboxes: dict[tuple[object, ray.ActorID, str], Outbox] = {}  # this process's, by Ray, actor and prefix


def outbox(actor: ray.actor.ActorHandle, prefix: str, name: str, copy: int) -> Outbox:
    """This process's outbox for a pipeline of the run called `name`, of which there is a copy more."""
    found = _outboxes.setdefault((process.which_ray(), actor._actor_id, prefix), Outbox(actor, prefix, name))
    found.add(copy)
    return found


class Outbox:
    """What this process has for one pipeline; all copies of the run in the process share one."""

    MINUTE: ClassVar = 60.0

    def __init__(self, actor: ray.actor.ActorHandle, prefix: str, name: str):
        self._where = actor, prefix, name
        self._copies: set[int] = set()  # of the run in this process
        self._changed = threading.Condition()
        self._task = ""  # the last one that had a copy
        self._wire: Wire | None = None

    def add(self, copy: int) -> None:
        """Notes a copy of the run in this process."""
        self._copies.add(copy)
        self._task = process.current_task() or self._task

    def open(self, stop: Callable[[], None] | None = None) -> Wire:
        """Makes itself known. stop: is called once if somebody presses "Stop run" on the run's page."""
        with self._changed:
            if not self._wire:
                self._wire = Wire(*self._where, self._copies, self._changed, stop)
            return self._wire

    def put(self, step: int, metrics: bytes, commit: bool) -> None:
        """Takes a report. Waits while the outbox is full, a minute at most; then the report is lost, and counted."""
        if process.forked_from:
            parent = process.forked_from[0]
            raise RuntimeError(f"log was called in a fork of process {parent}, which can't reach Ray: log there")
        wire = self._wire or self.open()
        if wire.is_cut:
            wire.raise_if_closed()
        backlog, in_task = wire.backlog, wire.me.in_task
        with self._changed:
            if (wire.closed or wire.error or not backlog.has_room(len(metrics))) and not self._finds_room(metrics):
                return
            if in_task:
                self._task = process.current_task() or self._task
                backlog.begin_task(self._task)
            backlog.put(step, commit, metrics)
            if len(backlog.waiting) == 1 and not in_task:
                self._changed.notify_all()
        if in_task:
            wire.submit()
        if not (wire.generation or wire.me.in_async_actor or _must_not_wait()):
            with self._changed:  # the first time, until the actor knows of this process
                known = lambda: wire.generation or wire.closed or wire.error or not backlog.reports  # noqa: E731
                self._changed.wait_for(known, backlog.patience)
                if not wire.generation:
                    wire.raise_if_closed()

    def _finds_room(self, metrics: bytes) -> bool:
        wire, size = self._wire, len(metrics)
        patience = 0.0 if _must_not_wait() else wire.backlog.patience
        self._changed.wait_for(lambda: wire.closed or wire.error or wire.backlog.has_room(size), patience)
        wire.raise_if_closed()
        if wire.error or not wire.backlog.has_room(size):
            wire.backlog.said += 1
            wire.lose(1, wire.error or TimeoutError("the pipeline actor does not answer"))
            return False
        return True

    def flush(self, timeout: float) -> bool:
        """Whether the actor has taken all that was put here, within so many seconds."""
        wire = self._wire
        if not wire:
            return True
        with self._changed:
            wire.flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: wire.error or not wire.backlog.reports, timeout)
            wire.flushing = False
            return bool(done) and not wire.error and not wire.lost

    def release(self, copy: int) -> None:
        """Lets go of a copy of the run. Behind the last one it waits until the actor has all.

        Called by `__del__`, maybe by the collector in any thread: takes no lock that it would have to wait for, calls
        nothing of Ray, and doesn't wait where an answer would have to come by this very thread. In an async actor
        other methods would stand still meanwhile.
        """
        self._copies.discard(copy)
        wire = self._wire
        if self._copies or process.forked_from or not wire or sys.is_finalizing():
            return
        patience = self.MINUTE if wire.me.in_task else 5.0
        inside = any(box._changed._is_owned() for box in [*_outboxes.values()])  # this thread is in one of them
        if inside or _must_not_wait() or wire.me.in_async_actor:
            patience = 0.0
        began = time.monotonic()
        while not wire.is_done and not self._copies:
            if self._changed.acquire(blocking=False):
                self._changed.notify_all()
                self._changed.release()
            if time.monotonic() >= max(began, wire.backlog.moved) + patience:  # no answer came for so long
                break
            time.sleep(0.0005)


def _must_not_wait() -> bool:
    """In a thread in which the answers come."""
    return (process.which_ray(), threading.get_ident()) in process.callback_threads
