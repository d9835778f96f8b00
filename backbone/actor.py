"""The pipeline actor: owns a W&B run, takes what its workers say, and goes on where it was when it had died."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ray

from . import artifacts, disk, exits, guest, wandb_internals
from .artifacts import Artifacts
from .calls import DEATHS, is_gone
from .ending import conclude, ledger
from .files import store_path
from .inbox import Batch, Sender
from .ledger import Ledger, RunFinishedError, line
from .nodes import with_nodes
from .outbox import Answer
from .pipeline import Pipeline
from .reduction import Reduction
from .steps import is_task
from .store import Row, Store
from .writer import ServiceDiedError, Writer

logger = logging.getLogger("wandb_run")


class Started(NamedTuple):
    """What the owner of a run learns of it."""

    ledger: Ledger
    config: dict[str, Any]
    project: str


class PipelineActor:
    """Owns a W&B run, and reduces the reports of its pipelines' workers to one row per step.

    Undecorated, because Ray can't inherit from a decorated class. For a pipeline of your own derive a class, set the
    three attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares another one's run and is given none
    job_type: str | None = None
    reduction = Reduction()

    GRACE: ClassVar = 5.0  # seconds that `finish` waits for a process that says nothing
    PAUSE: ClassVar = 0.3  # seconds without news after which plain tasks, which can't be asked, have said all
    CLOCK: ClassVar = 5.0  # seconds between two looks at the clock

    def __init__(self, letter: Path):
        self._letter_path, self._letter = letter, guest.read_letter(letter)
        guest.move_in(self._letter)
        self._generation = uuid.uuid4().hex
        self._changed = threading.Condition()  # guards all that follows
        self._store: Store | None = None
        self._pipelines: dict[str, Pipeline] = {}
        self._deaths: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()  # prefix and sender
        self._event = threading.Condition()  # guards what `hold` tells
        self._ended: set[str] = set()
        self._stopped = False
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._come_back()
        threading.Thread(target=self._look_after, daemon=True).start()
        threading.Thread(target=self._watch_owner, daemon=True).start()

    # Starting

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline to the run, which the first one starts."""
        with self._changed:
            if self._store is None:
                try:
                    self._begin()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kind = type(error) if type(error) in (TypeError, ValueError, OSError) else RuntimeError
                    raise kind(" ".join(str(error).split())[:500]) from error
            if prefix not in self._pipelines:
                self._writer.define(prefix, self._pipelines)
                self._pipelines[prefix] = Pipeline(self._store, prefix, reduction)
            self._pipelines[prefix].begin(reduction, workers, self._writer.totals(prefix))
            run = self._writer.run
            return Started(ledger(self._store, self._pipelines[prefix]), dict(run.config), run.project)

    def _begin(self) -> None:
        """Starts the run, or goes on with what a dead actor has left."""
        init, life = self._letter.init, str(self._letter_path)
        folder = Path(init["dir"], "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(store_path(folder, init["id"]))
        if store.facts.get("life") != life and "ledgers" in store.facts:  # the run of an earlier process, finished
            store.remove()
            store = Store(store.path)
        store.hear = self._hear
        facts, self._pipelines = store.facts, Pipeline.all(store)
        if again := facts.get("life") == life:
            rows = len(disk.numbers(facts.get("paths", ())))
            deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
            store.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
            if deaths > DEATHS:
                raise RuntimeError(f"given up: the pipeline actor died {deaths} times without a row in between")
            self._ended = {prefix for prefix, pipeline in self._pipelines.items() if pipeline.ended}
        else:  # a new run, or that of an earlier process which did not finish it
            for pipeline in self._pipelines.values():
                pipeline.end()
            store.note(life=life, deaths=0)
        init = init | dict(settings=with_nodes(init["settings"]))
        self._writer = Writer(store, init, self._stop)
        try:
            if "ledgers" not in facts:
                self._writer.start(self._pipelines)
        except Exception:
            store.close() if again or self._pipelines else store.remove()
            raise
        self._artifacts, self._store = Artifacts(store, self._writer, self._changed), store

    def _come_back(self) -> None:
        """What a restarted actor does first. If it can't, it dies, and tries again until it has given up."""
        folder = Path(self._letter.init["dir"], "wandb")
        if not store_path(folder, self._letter.init["id"]).exists():  # then it died before or after all
            return
        try:
            self._begin()
        except Exception as error:
            if "given up" in str(error):
                raise  # out of a constructor: Ray does not restart it any more
            logger.warning("the pipeline actor can't go on: %s", line(error))
            os._exit(1)

    # Receiving

    def push(self, batch: Batch, holding: Sequence[ray.ObjectRef]) -> Answer:
        """Takes a batch. holding: a call of `hold` by the sender, whose fate tells of the sender's death."""
        for call in holding:
            call.future().add_done_callback(lambda end: self._heard_end(batch.prefix, batch.sender, end))
        with self._changed:
            pipeline = self._pipelines.get(batch.prefix)
            if not pipeline or pipeline.ended:
                return Answer(self._generation, finished=True)
            self._log(pipeline.push(batch))
            self._changed.notify_all()
            return Answer(self._generation)

    def _log(self, rows: Sequence[Row]) -> None:
        try:
            for row in rows:
                self._writer.log(row)
        except ServiceDiedError:
            os._exit(1)  # only a new process gets a new wandb-core

    def _heard_end(self, prefix: str, sender: str, end: Future) -> None:
        if end.exception():
            self._deaths.put((prefix, sender))

    def _look_after(self) -> None:
        """Does what nobody pushes: deaths, of wandb-core too, and the clock."""
        while True:
            dead = None
            with contextlib.suppress(queue.Empty):
                dead = self._deaths.get(timeout=self.CLOCK)
            if self._store and wandb_internals.service_is_dead():
                os._exit(1)
            with self._changed, contextlib.suppress(sqlite3.Error):  # the disk is full: the next time
                for prefix, pipeline in self._pipelines.items():
                    if not pipeline.ended and dead and dead[0] == prefix:
                        self._log(pipeline.died(dead[1]))
                    elif not pipeline.ended and not dead:
                        self._log(pipeline.tick())
                self._changed.notify_all()

    @ray.method(concurrency_group="hold")
    def hold(self, seen: int) -> tuple[int, set[str], bool]:
        """Returns at the next event after `seen` of them: a pipeline ends, or somebody wants the run stopped.

        Returns how many there were, the prefixes of the pipelines that end and whether the run is to be stopped.
        """
        with self._event:
            self._event.wait_for(lambda: len(self._ended) + self._stopped > seen)
            return len(self._ended) + self._stopped, set(self._ended), self._stopped

    def _stop(self) -> None:
        with self._event:
            self._stopped = True
            self._event.notify_all()

    @ray.method(concurrency_group="control")
    def expect(self, prefix: str, workers: int) -> None:
        with self._changed:
            self._raise_if_ended(prefix)
            self._log(self._pipelines[prefix].expect(workers))

    @ray.method(concurrency_group="control")
    def progress(self, prefix: str) -> tuple[Ledger, dict[str, Any]]:
        """The ledger so far, and the numbers of the row of the highest step (keys without prefix)."""
        with self._changed:
            return ledger(self._store, self._pipelines[prefix]), self._pipelines[prefix].last_row

    # Artifacts

    @ray.method(concurrency_group="control")
    def stage(self, to: Path, offset: int, piece: bytes) -> None:
        """Writes a piece of a file from another node."""
        artifacts.put_piece(to, offset, piece)

    @ray.method(concurrency_group="control")
    def log_artifact(self, prefix: str, folder: Path, what: Mapping[str, Any]) -> None:
        """Has an artifact logged whose files are in `folder`."""
        with self._changed:
            self._raise_if_ended(prefix)
            self._artifacts.log(folder, what)

    @ray.method(concurrency_group="control")
    def use_artifact(self, prefix: str, name: str) -> None:
        with self._changed:
            self._raise_if_ended(prefix)
            self._artifacts.use(name)

    def _raise_if_ended(self, prefix: str) -> None:
        if prefix not in self._pipelines or self._pipelines[prefix].ended:
            raise RunFinishedError(f"run {self._letter.init.get('name')!r} is finished")

    # Finishing

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int, failure: str | None = None, prefix: str | None = None) -> dict[str, Ledger]:
        """Finishes the run, or only one pipeline of a run that goes on; returns the ledgers by prefix."""
        with self._changed:
            ends = [prefix] if prefix is not None else list(self._pipelines)
            self._end([self._pipelines[prefix] for prefix in ends if not self._pipelines[prefix].ended])
            if prefix is not None:
                return {prefix: ledger(self._store, self._pipelines[prefix])}
        self._artifacts.finish(self._writer.timeout)  # its threads need the lock
        with self._changed:
            if "ledgers" not in self._store.facts:
                try:
                    self._writer.finish(exits.INTERRUPTED if self._stopped and exit_code else exit_code, failure)
                except ServiceDiedError:
                    os._exit(1)  # Ray repeats the call on the next actor
                conclude(self._store, self._pipelines, self._writer.there)
            return self._store.facts["ledgers"]

    def _end(self, pipelines: Sequence[Pipeline]) -> None:
        """Waits for the last word of each sender, then closes the steps."""
        with self._event:
            self._ended |= {pipeline.prefix for pipeline in pipelines}
            self._event.notify_all()
        began = time.time()
        senders = [sender for pipeline in pipelines for sender in pipeline.inbox.senders.values()]
        while any(is_task(sender.worker) and time.time() - sender.heard < self.PAUSE for sender in senders):
            self._changed.wait(self.PAUSE)
        while silent := self._silent(pipelines):
            self._changed.wait(0.05)
            for pipeline, id_, sender in silent if time.time() - began > 0.5 else ():  # Ray may know more by now
                if is_gone(sender.worker, sender.process):
                    self._log(pipeline.died(id_))
            if all(time.time() - max(began, sender.heard) > self.GRACE for _, _, sender in silent):
                break
        for _, _, sender in self._silent(pipelines):
            node, pid = sender.process
            self._store.warn(
                f"silent {pid} {node}",
                f"process {pid} on node {node} did not answer within {self.GRACE} s: {sender.received} of its reports "
                f"have arrived, of {sender.said} at least",
            )
        for pipeline in pipelines:
            if not pipeline.ended:  # by another caller, while this one waited
                self._log(pipeline.end())

    def _silent(self, pipelines: Sequence[Pipeline]) -> list[tuple[Pipeline, str, Sender]]:
        """Senders that may have more to say."""
        each = ((pipeline, *found) for pipeline in pipelines for found in pipeline.inbox.senders.items())
        return [found for found in each if not found[2].ended]

    @ray.method(concurrency_group="control", max_task_retries=0)
    def leave(self) -> None:
        """The ledgers have arrived, so nothing of this is needed any more."""
        self._forget()
        ray.actor.exit_actor()

    def _forget(self) -> None:
        if self._store:
            self._store.remove()
        guest.forget_letter(self._letter_path)

    def _watch_owner(self) -> None:
        """Finishes the run when the process that it belongs to is gone; Ray leaves two seconds for that, or more."""
        raylet = os.getppid()
        if not guest.has_died(self._letter_path):
            return
        code = guest.how_it_ended(self._letter.ray_worker) if self._letter.ray_worker else 1
        if not self._letter.ray_worker:
            self.GRACE = 0.5
        ended = code, "the process that the run belonged to is gone" if code else None
        try:
            self.finish(*(guest.read_letter(self._letter_path).ended or ended))
            self._forget()
        except Exception as error:  # the store stays, for the next run of that id
            logger.warning("run %s could not be finished: %s", self._letter.init["id"], line(error))
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown()  # waits until wandb-core has written all; killed with this process, it would not
        if os.getppid() != raylet:  # all of Ray is gone
            os._exit(0)
        ray.kill(ray.get_runtime_context().current_actor)

    def _hear(self, warning: str) -> None:
        logger.warning("W&B run %s: %s", self._letter.init.get("name") or self._letter.init["id"], warning)
        with contextlib.suppress(Exception):
            self._writer.run.write_logs(warning)


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its owner until the run is finished."""
    if not issubclass(cls, PipelineActor):
        raise TypeError(f"{cls.__name__} must be derived from PipelineActor")
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    threads = {"hold": 1, "control": 8}  # next to the one that takes the reports, in their order
    return ray.remote(concurrency_groups=threads, num_cpus=0, **lives)(cls)
