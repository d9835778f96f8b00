"""The way from a process to the pipeline actor: batches are submitted, answers come by callbacks.

No thread waits inside Ray: one that does so while its process ends crashes it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Set
from concurrent.futures import Future
from typing import Any

import ray

from . import process
from .backlog import Backlog
from .calls import has_left, plain, ray_answers
from .ledger import run_is_finished

logger = logging.getLogger("wandb_run")


class Wire:
    """Sends the reports of one outbox, several batches at a time.

    A thread submits them, so that logging takes microseconds. In a plain task who logs submits them, because the
    process may end right after it.

    copies: of the run in this process; behind the last one it says goodbye.
    stop: is called once if somebody presses "Stop run" on the run's page.

    Raises RuntimeError where Ray is not running.
    """

    def __init__(
        self,
        actor: ray.actor.ActorHandle,
        prefix: str,
        name: str,
        copies: Set[int],
        changed: threading.Condition,
        stop: Callable[[], None] | None,
    ):
        self._ray = process.which_ray()
        if not self._ray:
            raise RuntimeError(f"Ray is not running, so nothing can be logged to run {name!r}")
        self._actor, self._prefix, self._name, self._copies, self._stop = actor, prefix, name, copies, stop
        self._changed = changed  # guards all that follows
        self.me = process.myself()
        self.backlog = Backlog(prefix, self.me.place, self.me.worker)
        self.generation = ""  # of the actor, in the last answer to a batch that it took
        self.closed = False  # nothing more is taken, and what is here is sent
        self.error: BaseException | None = None  # why nothing can be sent any more
        self.flushing = self._submitting = False
        self.lost = 0  # reports of this process
        # A call of the actor without an answer: Ray tells the actor when the call's owner dies. Not in a plain task,
        # whose process could not end as long as it waits for an answer.
        self._holding: Any = None
        self._announce = False  # the next batch tells the actor of it
        self._known: tuple[Set[str], bool] = set(), False  # events of the run that this process knows of
        if not self.me.in_task:
            self._hold()
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def is_cut(self) -> bool:
        """Ray is not running any more, or another one."""
        return self._ray is not process.which_ray()

    def raise_if_closed(self) -> None:
        if self.closed:
            raise run_is_finished(self._name)
        if self.is_cut:
            raise RuntimeError(f"Ray is not running any more, so nothing can be logged to run {self._name!r}")

    # Sending

    def _work(self) -> None:
        me, unheard = (self._ray, threading.get_ident()), None
        process.callback_threads.add(me)
        while not self._is_over:
            with self._changed:
                due = self._changed.wait_for(
                    lambda: self._is_over or (self._is_due and not self._is_taken_care_of), timeout=5.0
                )
                oldest = min(self.backlog.under_way, default=None)
            if due:
                self.submit()
            # When all of Ray is gone, a call gets neither answer nor error. A GCS that restarts is back the next time.
            if due or oldest is None or (not self.is_cut and ray_answers()):
                unheard = None
            elif oldest == unheard:
                self._fail(RuntimeError("Ray is not running any more"))
            else:
                unheard = oldest
        process.callback_threads.discard(me)

    @property
    def _is_over(self) -> bool:
        return self.error is not None or (self.closed and self.is_done)

    @property
    def _is_taken_care_of(self) -> bool:
        """A task's reports are submitted by who logs them, up to the goodbye: it may end as soon as that returns."""
        return self._submitting or (self.me.in_task and not self._leaving)

    @property
    def _is_due(self) -> bool:
        if self.error:
            return False
        more = not self.backlog.is_full or self.flushing or self.me.in_task or self._leaving
        return bool((self.backlog.waiting and more) or self._owes_goodbye or (self._announce and self.generation))

    @property
    def _leaving(self) -> bool:
        return self.closed or not self._copies

    @property
    def _owes_goodbye(self) -> bool:
        backlog = self.backlog
        return bool(self._leaving and backlog.serial and (not backlog.last_sent or backlog.of_task))

    @property
    def is_done(self) -> bool:
        """Nothing of this process will be sent, or wait for an answer, unless more is logged."""
        return self.error is not None or not (self.backlog.waiting or self.backlog.under_way or self._owes_goodbye)

    def submit(self) -> None:
        """Sends batches as long as some are due; one thread at a time, so that they are sent in order."""
        mine = False
        while True:
            with self._changed:
                if mine:
                    self._submitting = mine = False
                if self._submitting or not self._is_due:
                    return
                batch = self.backlog.next_batch(self._leaving, may_end=self.me.in_task)
                announced = [self._holding] if self._announce else []
                self._announce, self._submitting, mine = False, True, True
            try:
                if self.is_cut:
                    raise RuntimeError("Ray is not running any more")
                answer = self._actor.push.remote(batch, announced).future()
                process.when_done(answer, functools.partial(self._answered, batch.serial))
            except Exception as error:  # Ray is not running any more
                self._fail(error)

    def _answered(self, serial: int, answer: Future) -> None:
        error = answer.exception()
        if isinstance(error, ray.exceptions.RayActorError):
            self._fail(error)
        with self._changed:
            reports = self.backlog.answered(serial)
            if error:
                self.lose(reports, error)
            else:
                told = answer.result()
                if told.finished:
                    self.closed = True
                    self.lose(reports, run_is_finished(self._name))
                else:
                    restarted = self.generation not in ("", told.generation)
                    self._announce |= restarted and self._holding is not None
                    self.generation = told.generation
            self._changed.notify_all()

    # What the run tells

    def _hold(self) -> None:
        self._announce, self._holding = True, self._actor.hold.remote(*self._known)
        process.when_done(self._holding.future(), self._hear)

    def _hear(self, event: Future) -> None:
        """Called when a pipeline of the run ends, somebody wants it stopped, or the actor is gone."""
        if event.exception():
            return self._fail(event.exception())
        with self._changed:
            self._known = ended, stopped = event.result()
            self.closed |= self._prefix in ended
            if not self.closed and not self.is_cut:
                self._hold()
            self._changed.notify_all()
        self.submit()
        if stopped and self._stop:
            stop, self._stop = self._stop, None
            threading.Thread(target=stop, daemon=True).start()  # it may call what waits for an answer

    def _fail(self, error: BaseException) -> None:
        """Nothing can be sent any more: the run is finished, its actor is gone for good, or Ray is."""
        with self._changed:
            self.closed |= has_left(error)
            self.error = error
            self.lose(self.backlog.drop(), error)
            self._changed.notify_all()

    def lose(self, reports: int, error: BaseException) -> None:
        if reports and not self.lost:
            logger.warning("run %s: reports are lost from now on, training goes on: %s", self._name, plain(error))
        self.lost += reports
