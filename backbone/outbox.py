"""A process's reports under way to the pipeline actor.

Nothing of this waits inside Ray: a thread that does so while its process ends crashes it. Batches are submitted, and
their answers come by callbacks. What waits here waits in Python, and not for ever.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import ray

from .calls import has_left, plain
from .inbox import Batch, Item
from .ledger import RunFinishedError
from .steps import is_task

logger = logging.getLogger("wandb_run")

_process = uuid.uuid4().hex  # who logs where no actor and no task does
_outboxes: dict[tuple[str, ray.ActorID, str], Outbox] = {}  # this process's, by session, actor and prefix
_forked: list[int] = []  # processes that this one is a fork of
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(os.getppid()))


class Answer(NamedTuple):
    """The actor's to a batch."""

    generation: str  # another one after each restart
    finished: bool = False  # the batch was not taken


class _Mark(threading.local):
    """Threads that must not wait for an outbox, because it waits for them."""

    depth = 0  # in how many outboxes this thread is
    of_ray = False  # it runs callbacks


_mark = _Mark()


class _Lock(threading.Condition):
    def __enter__(self) -> None:
        super().__enter__()
        _mark.depth += 1

    def __exit__(self, *error: object) -> None:
        _mark.depth -= 1
        super().__exit__(*error)


def outbox(actor: ray.actor.ActorHandle, prefix: str, name: str) -> Outbox:
    """This process's outbox for a pipeline of the run called `name`."""
    return _outboxes.setdefault((_session(), actor._actor_id, prefix), Outbox(actor, prefix, name))


def _session() -> str:
    """Which Ray this process is connected to. A handle is of no use in another one."""
    return ray.get_runtime_context().get_session_name() if ray.is_initialized() else ""


def _current_task() -> str:
    """The plain task that this thread runs. Other threads of a task have no id of it."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    if not context or context.worker.mode != ray.WORKER_MODE:  # a driver, in which Ray warns of the question below
        return ""
    if context.get_actor_id() or threading.current_thread() is not threading.main_thread():
        return ""
    task = context.get_task_id()
    return f"task {task} {context.worker.core_worker.get_current_task_attempt_number()}" if task else ""


class Outbox:
    """What this process has for one pipeline; all copies of the run in the process share one.

    A thread submits the reports, several batches at a time, so that `put` takes microseconds. In a plain task `put`
    submits them itself, because its process may end right after it.
    """

    BATCH, UNDER_WAY = 128, 4  # reports in a batch, and batches without an answer
    LIMIT, LIMIT_BYTES = 512, 32 << 20  # of all reports that the actor has not answered
    MINUTE = 60.0

    def __init__(self, actor: ray.actor.ActorHandle, prefix: str, name: str):
        self._actor, self._prefix, self._name = actor, prefix, name
        self.copies: set[int] = set()  # of the run in this process
        self._changed = _Lock()  # guards all that follows
        self._opened, self._task = False, ""
        self._waiting: list[Item] = []
        self._under_way: dict[int, tuple[int, int]] = {}  # serial -> reports and bytes of a batch without an answer
        self._reports = self._bytes = 0  # that wait or are under way
        self._said = self._serial = 0
        self._submitting = self._flushing = False
        self._last_sent = False  # the actor has been told that there is no more
        self._generation = ""  # of the actor, in its last answer
        # A call of the actor without an answer: Ray tells the actor when the call's owner dies. Not in a plain task,
        # whose process could not end as long as it waits for an answer.
        self._holding: Any = None
        self._announce = False  # the next batch tells the actor of it
        self._seen = 0  # how many events of the run this outbox knows of
        self._stop: Callable[[], None] | None = None
        self._closed = False  # nothing more is taken, and what is here is sent
        self._error: Exception | None = None  # why nothing can be sent any more
        self._told = False  # the user knows that reports are lost
        self._moved = 0.0  # when an answer came, or the outbox was empty

    def open(self, stop: Callable[[], None] | None = None) -> None:
        """Makes itself known. stop: is called once if somebody presses "Stop run" on the run's page."""
        with self._changed:
            if self._opened:
                return
            self._stop, self._session = stop, _session()
            if not self._session:
                raise RuntimeError(f"Ray is not running, so nothing can be logged to run {self._name!r}")
            context = ray.get_runtime_context()
            self._id, self._process = uuid.uuid4().hex, (context.get_node_id(), os.getpid())
            actor_id, core = context.get_actor_id(), context.worker.core_worker
            self._in_task = not actor_id and context.worker.mode == ray.WORKER_MODE
            self._in_async_actor = bool(actor_id) and core.current_actor_is_asyncio()
            self._worker = f"actor {actor_id}" if actor_id else self._task or f"process {_process}"
            if not self._in_task:
                self._hold()
            self._opened = True
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, step: int, metrics: bytes, commit: bool) -> None:
        """Takes a report. Waits while the outbox is full, a minute at most; then the report is lost, and counted."""
        if _forked:
            raise RuntimeError(f"log was called in a fork of process {_forked[0]}, which can't reach Ray: log there")
        if not self._opened:
            self.open()
        with self._changed:
            if not self._has_room(len(metrics)):
                patience = self._moved + self.MINUTE - time.monotonic()
                self._changed.wait_for(lambda: self._has_room(len(metrics)), max(0.0, patience))
            self._raise_if_closed()
            self._said += 1
            if self._error or not self._has_room(len(metrics)):
                return self._lose(1, self._error or TimeoutError("the pipeline actor does not answer"))
            if self._in_task:
                self._begin_task()
            if not self._reports:
                self._moved = time.monotonic()
            self._waiting.append((self._worker, step, commit, metrics))
            self._reports += 1
            self._bytes += len(metrics)
            self._last_sent = False
            if len(self._waiting) == 1 and not self._in_task:
                self._changed.notify_all()
        if self._in_task:
            self._submit()
        if not (self._generation or self._in_async_actor):  # the first time, until the actor knows of this process
            with self._changed:
                self._changed.wait_for(lambda: self._generation or self._closed or self._error, self.MINUTE)
                if not self._generation:
                    self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RunFinishedError(f"run {self._name!r} is finished, so nothing more can be logged to it")
        if self._error and self._session != _session():
            raise RuntimeError(f"Ray is not running any more, so nothing can be logged to run {self._name!r}")

    def _has_room(self, size: int) -> bool:
        room = self._reports < self.LIMIT and self._bytes + size <= self.LIMIT_BYTES
        return room or not self._reports or self._closed or bool(self._error)

    def add(self, copy: int) -> None:
        """Notes a copy of the run in this process."""
        self.copies.add(copy)
        self._task = _current_task() or self._task

    def _begin_task(self) -> None:
        """A task that logs in this process takes the place of the one before."""
        self._task = _current_task() or self._task
        if self._task and self._worker != self._task:
            if is_task(self._worker):
                self._waiting.append((self._worker, None, False, b""))
            self._worker = self._task

    # Sending

    def _work(self) -> None:
        _mark.of_ray = True
        while not self._error and not (self._closed and self._last_sent):
            with self._changed:
                self._changed.wait_for(lambda: self._error or (self._is_due() and not self._is_taken_care_of))
            self._submit()

    @property
    def _is_taken_care_of(self) -> bool:
        """A task's reports are submitted by who logs them, up to the goodbye: it may end as soon as that returns."""
        return self._submitting or (self._in_task and not self._leaving)

    def _is_due(self) -> bool:
        if self._error:
            return False
        more = len(self._under_way) < self.UNDER_WAY or self._flushing or self._in_task or self._leaving
        return bool((self._waiting and more) or self._owes_goodbye or (self._announce and self._generation))

    @property
    def _leaving(self) -> bool:
        return self._closed or not self.copies

    @property
    def _owes_goodbye(self) -> bool:
        return bool(self._leaving and self._serial and (not self._last_sent or is_task(self._worker)))

    def _submit(self) -> None:
        """Sends batches as long as some are due; one thread at a time, so that they are sent in order."""
        mine = False
        while True:
            with self._changed:
                if mine:
                    self._submitting = mine = False
                if self._submitting or not self._is_due():
                    return
                batch, announced = self._next_batch(), [self._holding] if self._announce else []
                self._announce, self._submitting, mine = False, True, True
            try:
                if self._session != _session():
                    raise RuntimeError("Ray is not running any more")
                answer = self._actor.push.remote(batch, announced).future()
                answer.add_done_callback(functools.partial(self._answered, batch.serial))
            except Exception as error:  # Ray is not running any more
                self._fail(error)

    def _next_batch(self) -> Batch:
        items, self._waiting = self._waiting[: self.BATCH], self._waiting[self.BATCH :]
        reports = sum(item[1] is not None for item in items)
        last = (self._leaving or self._in_task) and not self._waiting
        if self._leaving and last and is_task(self._worker):
            items.append((self._worker, None, False, b""))
            self._worker = f"process {_process}"
        serial, self._serial, self._last_sent = self._serial, self._serial + 1, last
        oldest = min(self._under_way, default=serial)
        self._under_way[serial] = reports, sum(len(item[3]) for item in items)
        return Batch(self._prefix, self._id, self._process, serial, oldest, self._said, last, items)

    def _answered(self, serial: int, answer: Future) -> None:
        _mark.of_ray = True
        error = answer.exception()
        if isinstance(error, ray.exceptions.RayActorError):
            self._fail(error)
        with self._changed:
            reports, size = self._under_way.pop(serial)
            self._reports -= reports
            self._bytes -= size
            self._moved = time.monotonic()
            if error:
                self._lose(reports, error)
            else:
                restarted = self._generation not in ("", answer.result().generation)
                self._announce |= restarted and self._holding is not None
                self._generation = answer.result().generation
                self._closed |= answer.result().finished
                if answer.result().finished:
                    self._lose(reports, RunFinishedError("the run is finished"))
            self._changed.notify_all()

    # What the run tells

    def _hold(self) -> None:
        self._announce, self._holding = True, self._actor.hold.remote(self._seen)
        self._holding.future().add_done_callback(self._hear)

    def _hear(self, event: Future) -> None:
        """Called when a pipeline of the run ends, somebody wants it stopped, or the actor is gone."""
        _mark.of_ray = True
        if event.exception():
            return self._fail(event.exception())
        self._seen, ended, stopped = event.result()
        if stopped and self._stop:
            stop, self._stop = self._stop, None
            stop()
        with self._changed:
            self._closed = self._prefix in ended
            if not self._closed and self._session == _session():
                self._hold()
            self._changed.notify_all()
        self._submit()

    def _fail(self, error: BaseException) -> None:
        """Nothing can be sent any more: the run is finished, its actor is gone for good, or Ray is."""
        with self._changed:
            self._closed |= has_left(error)
            self._error = error
            lost = sum(item[1] is not None for item in self._waiting)
            self._waiting.clear()
            self._reports -= lost
            self._lose(lost, error)
            self._changed.notify_all()

    def _lose(self, reports: int, error: BaseException) -> None:
        if reports and not self._told:
            self._told = True
            logger.warning("run %s: reports are lost from now on, training goes on: %s", self._name, plain(error))

    # The end

    def flush(self, timeout: float) -> bool:
        """Whether the actor had all that was put here within so many seconds."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._error or not self._reports, timeout)
            self._flushing = False
            return bool(done) and not self._error

    def release(self, copy: int) -> None:
        """Lets go of a copy of the run. Behind the last one it waits until the actor has all.

        Called by `__del__`, maybe by the collector in any thread: takes no lock that it would have to wait for, calls
        nothing of Ray, and doesn't wait where an answer would have to come by this very thread. In an async actor
        other methods would stand still meanwhile.
        """
        self.copies.discard(copy)
        if self.copies or _forked or not self._opened or sys.is_finalizing():
            return
        patience = self.MINUTE if self._in_task else 5.0
        if _mark.depth or _mark.of_ray or self._in_async_actor:
            patience = 0.0
        deadline = time.monotonic() + patience
        while not self._error and (self._waiting or self._under_way or self._owes_goodbye):
            if self._changed.acquire(blocking=False):
                self._changed.notify_all()
                self._changed.release()
            if time.monotonic() >= deadline:
                break
            time.sleep(0.0005)
