"""The pipeline actor: owns a W&B run, takes what its workers say, and goes on where it was when it had died."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import threading
import uuid
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.runtime_context import get_runtime_context

from . import artifacts, exits, guest, owner, wandb_internals
from .events import Events
from .files import store_path
from .inbox import Answer, Batch
from .last_words import hear_out
from .ledger import Ledger, Ledgers, RunFinishedError, line, run_is_finished
from .nodes import with_nodes
from .reduction import Reduction
from .run import GivenUpError, Run, Started, ledger
from .store import Row
from .writer import ServiceDiedError

logger = logging.getLogger("wandb_run")


class PipelineActor:
    """Owns a W&B run, and reduces the reports of its pipelines' workers to one row per step.

    Undecorated, because Ray can't inherit from a decorated class. For a pipeline of your own derive a class, set the
    three attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares another one's run and is given none
    job_type: str | None = None
    reduction = Reduction()

    CLOCK: ClassVar = 5.0  # seconds between two looks at the clock

    def __init__(self, letter: Path):
        self._letter_path, self._letter = letter, guest.read_letter(letter)
        guest.move_in(self._letter)
        self._generation = uuid.uuid4().hex
        self._changed = threading.Condition()  # guards all that follows
        self._run: Run | None = None
        self._deaths: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()  # prefix and sender
        self._events = Events()
        if get_runtime_context().was_current_actor_reconstructed:
            self._come_back()
        threading.Thread(target=self._look_after, daemon=True).start()
        of_owner = letter, self._letter, self.finish, self._forget
        threading.Thread(target=owner.watch, args=of_owner, daemon=True).start()

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline to the run, which the first one starts."""
        with self._changed:
            if self._run is None:
                try:
                    self._begin()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kind = type(error) if type(error) in (TypeError, ValueError, OSError) else RuntimeError
                    raise kind(" ".join(str(error).split())[:500]) from error
            return self._run.join(prefix, reduction, workers)

    def _begin(self) -> None:
        """Starts the run, or goes on with what a dead actor has left."""
        init = self._letter.init | dict(settings=with_nodes(self._letter.init["settings"]))
        run = Run.open(str(self._letter_path), init, self._changed, self._events.stop)
        run.store.hear = self._hear
        run.start()
        self._run = run

    def _come_back(self) -> None:
        """What a restarted actor does first. If it can't, it dies, and tries again until it has given up."""
        folder = Path(self._letter.init["dir"], "wandb")
        if not store_path(folder, self._letter.init["id"]).exists():  # then it died before or after all
            return
        try:
            self._begin()
            self._events.end(prefix for prefix, pipeline in self._run.pipelines.items() if pipeline.ended)
        except GivenUpError:
            raise  # out of a constructor: Ray does not restart it any more
        except Exception as error:
            logger.warning("the pipeline actor can't go on: %s", line(error))
            os._exit(1)

    # Receiving

    def push(self, batch: Batch, holding: Sequence[ray.ObjectRef]) -> Answer:
        """Takes a batch. holding: a call of `hold` by the sender, whose fate tells of the sender's death."""
        sender = batch.prefix, batch.sender
        for call in holding:  # each stays as long as the run; the batch must not
            call.future().add_done_callback(lambda end: end.exception() and self._deaths.put(sender))
        with self._changed:
            try:
                self._log(self._running(batch.prefix).pipelines[batch.prefix].push(batch))
            except RunFinishedError:
                return Answer(self._generation, finished=True)
            self._changed.notify_all()
            return Answer(self._generation, finished=False)

    def _log(self, rows: Sequence[Row]) -> None:
        try:
            self._run.log(rows)
        except ServiceDiedError:
            os._exit(1)  # only a new process gets a new wandb-core

    def _look_after(self) -> None:
        """Does what nobody pushes: deaths, of wandb-core too, and the clock."""
        while True:
            dead = None
            with contextlib.suppress(queue.Empty):
                dead = self._deaths.get(timeout=self.CLOCK)
            guest.keep_letter(self._letter_path)
            if self._run and wandb_internals.service_is_dead():
                os._exit(1)
            try:
                with self._changed:
                    for prefix, pipeline in (self._run.pipelines if self._run else {}).items():
                        if not pipeline.ended and (not dead or dead[0] == prefix):
                            self._log(pipeline.died(dead[1]) if dead else pipeline.tick())
                    self._changed.notify_all()
            except Exception as error:
                if not isinstance(error, sqlite3.Error):  # of a full disk `push` tells
                    logger.warning("W&B run %s: %s", self._letter.init["id"], line(error))
                if dead:
                    threading.Timer(self.CLOCK, self._deaths.put, [dead]).start()

    @ray.method(concurrency_group="hold")
    def hold(self, ended: Set[str], stopped: bool) -> tuple[set[str], bool]:
        """Returns at the next event of the run: see `Events.beyond`."""
        return self._events.beyond(ended, stopped)

    @ray.method(concurrency_group="control")
    def expect(self, prefix: str, workers: int) -> None:
        with self._changed:
            self._log(self._running(prefix).pipelines[prefix].expect(workers))

    @ray.method(concurrency_group="control")
    def progress(self, prefix: str) -> tuple[Ledger, dict[str, Any]]:
        """The ledger so far, and the numbers of the row of the highest step (keys without prefix)."""
        with self._changed:
            run = self._running()
            return ledger(run.store, run.pipelines[prefix]), run.pipelines[prefix].last_row

    @ray.method(concurrency_group="control")
    def stage(self, to: Path, offset: int, piece: bytes) -> None:
        """Writes a piece of a file from another node."""
        artifacts.put_piece(to, offset, piece)

    @ray.method(concurrency_group="control")
    def log_artifact(self, prefix: str, folder: Path, what: Mapping[str, Any]) -> None:
        """Has an artifact logged whose files are in `folder`."""
        with self._changed:
            self._running(prefix).artifacts.log(folder, what)

    @ray.method(concurrency_group="control")
    def use_artifact(self, prefix: str, name: str) -> None:
        with self._changed:
            self._running(prefix).artifacts.use(name)

    def _running(self, prefix: str | None = None) -> Run:
        """The run; with a prefix: in which that pipeline goes on. Raises RunFinishedError where there is none."""
        pipeline = self._run and self._run.pipelines.get(prefix)
        if not self._run or (prefix is not None and (not pipeline or pipeline.ended)):
            raise run_is_finished(self._letter.init.get("name") or self._letter.init["id"])
        return self._run

    # Finishing

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int, failure: str | None = None, prefix: str | None = None, wait: float = 5) -> Ledgers:
        """Finishes the run, or only one pipeline of a run that goes on.

        wait: so many seconds for a process that says nothing. Raises RunFinishedError where there is no run.
        """
        try:
            with self._changed:
                run = self._running()  # a start that is under way ends first
                ends = [each for each in run.pipelines.values() if prefix in (None, each.prefix) and not each.ended]
                self._events.end(pipeline.prefix for pipeline in ends)
                hear_out(ends, run, self._changed, wait)
                run.end(ends)
                if prefix is not None:
                    return {prefix: ledger(run.store, run.pipelines[prefix])}
            return run.finish(exits.INTERRUPTED if self._events.stopped and exit_code else exit_code, failure)
        except ServiceDiedError:
            os._exit(1)  # Ray repeats the call on the next actor

    @ray.method(concurrency_group="control", max_task_retries=0)
    def leave(self) -> None:
        """The ledgers have arrived, so nothing of this is needed any more."""
        self._forget()
        ray.actor.exit_actor()

    def _forget(self) -> None:
        with self._changed:
            if self._run:
                self._run.store.remove()
                self._run = None
        guest.forget_letter(self._letter_path)

    def _hear(self, warning: str) -> None:
        logger.warning("W&B run %s: %s", self._letter.init.get("name") or self._letter.init["id"], warning)
        with contextlib.suppress(Exception):
            self._run.writer.run.write_logs(warning)


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its owner until the run is finished."""
    if not issubclass(cls, PipelineActor):
        raise TypeError(f"{cls.__name__} must be derived from PipelineActor")
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    threads = {"hold": 1, "control": 8}  # next to the one that takes the reports, in their order
    # pyrefly: ignore[unexpected-keyword] - Ray's own types lack some of its options
    return ray.remote(concurrency_groups=threads, num_cpus=0, **lives)(cls)
