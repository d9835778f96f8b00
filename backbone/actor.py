"""The pipeline actor: hosts a run, reads what its workers log, and goes on where it was when it had died."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.runtime_context import get_runtime_context

from . import artifacts, exits, owner, recover, wandb_internals
from .inbox import GONE, HOME
from .ledger import Ledger, Ledgers, RunFinishedError, line, run_is_finished
from .nodes import give_back, with_nodes
from .process import has_ended, which_ray
from .reading import Reading, lives
from .reduction import Reduction
from .relay import Relays
from .run import GivenUpError, Run, Started
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

    def __init__(self, folder: Path):
        self._letter = owner.read_letter(folder)
        owner.move_in(self._letter)
        self._lock = threading.RLock()  # guards all that follows
        self._run: Run | None = None
        self._over = False  # the run
        self._relays: Relays | None = None
        self._come_back()
        threading.Thread(target=self._read_on, daemon=True).start()
        threading.Thread(target=self._look_for_nodes, daemon=True).start()

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline to the run, which the first one starts."""
        with self._lock:
            if self._run is None:
                try:
                    self._begin()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kind = type(error) if type(error) in (TypeError, ValueError, OSError) else RuntimeError
                    raise kind(" ".join(str(error).split())[:500]) from error
            return self._run.join(prefix, reduction, workers)

    def _begin(self) -> None:
        """Starts the run, or goes on with what a dead actor has left."""
        letter = self._letter
        init = letter.init | dict(settings=with_nodes(letter.init["settings"], letter.address.nonce))
        run = Run.open(init, letter.address, letter.process, self._lock, exits.stop_file(letter.address.folder).touch)
        run.state.hear = self._hear
        run.start()
        self._run, self._relays = run, Relays(letter.address, run.inbox.positions, run.inbox.node_is_gone)

    def _come_back(self) -> None:
        """What a restarted actor does first. If it can't, it dies, and tries again until it has given up."""
        if not (self._letter.address.folder / "pipelines").exists():  # then it died before the run began
            return
        try:
            self._begin()
        except GivenUpError:
            raise  # out of a constructor: Ray does not restart it any more
        except Exception as error:
            logger.warning("the pipeline actor can't go on: %s", line(error))
            os._exit(1)

    # Reading

    def _read_on(self) -> None:
        """Reads as often as there is something, less often where there is nothing, until the owner has ended."""
        pause, readings, alive = 0.02, [], time.monotonic()
        while not self._over:
            with self._lock:
                began = time.monotonic()
                if self._run and not self._run.reader.is_closed:
                    readings = self._read()
                    if self._run.inbox.owner_end:
                        return self._end_with_owner()
                elif lives(self._letter.address.folder, self._letter.process):
                    alive = began
                elif began > alive + 5:  # so long `leave` may be on its way
                    return self._end_with_owner()
            news = any(not reading.is_empty for _, reading in readings)
            pause = 0.02 if news else min(0.25, 1.2 * pause)
            if not any(reading.is_cut for _, reading in readings):
                time.sleep(max(pause, 4 * (time.monotonic() - began)))

    def _read(self, look: bool = False) -> list[tuple[str, Reading]]:
        """One reading, with what relays have brought. A fault ends this process: the next goes on from the state."""
        try:
            self._run.paused = bool(self._relays.silent(5))
            readings = self._run.read(self._relays.brought(), look)
        except sqlite3.Error as error:
            self._run.state.warn("disk", f"{line(error)}: nothing is read until that ends, training goes on")
            return []
        except Exception as error:
            logger.exception("run %s: the pipeline actor starts again: %s", self._letter.init["id"], line(error))
            os._exit(1)
        for node, _ in readings:
            self._relays.go_on(node)
        return readings

    def _look_for_nodes(self) -> None:
        """Once a second: nodes that have outboxes, which Ray's GCS knows, and whether wandb-core is alive."""
        while True:
            with contextlib.suppress(Exception):  # a GCS that restarts
                if self._relays and which_ray():
                    self._relays.look()
            if self._run and wandb_internals.service_is_dead():
                os._exit(1)  # only a new process gets a new one
            time.sleep(1)

    def _catch_up(self, deadline: float, closing: bool) -> None:
        """Reads all that has been logged by now; nothing more is taken if the run is `closing`."""
        if closing:
            self._run.reader.close()
            with contextlib.suppress(Exception):  # all of Ray is gone
                self._relays.close()
        waiting = {HOME, *self._relays.nodes}
        while waiting & {HOME, *self._relays.nodes}:
            for node, reading in self._read(look=True):
                done = reading.is_last if closing and node != HOME else reading.is_empty
                waiting -= {node} if done else set()
            for node in self._relays.silent(Relays.PATIENCE):
                self._relays.give_up(node, f"it did not answer within {Relays.PATIENCE:.0f} s")
            if time.monotonic() > deadline:
                if closing:
                    self._run.inbox.unheard("what was logged last: it could not be read in time")
                return
            time.sleep(0.005)

    # Calls

    @ray.method(concurrency_group="control")
    def expect(self, prefix: str, workers: int) -> None:
        with self._lock:
            self._running().expect(prefix, workers)

    @ray.method(concurrency_group="control")
    def progress(self, prefix: str) -> tuple[Ledger, dict[str, Any]]:
        """The ledger so far, and the numbers of the row of the highest step (keys without prefix)."""
        with self._lock:
            run = self._running()
            pipeline = run.pipeline(prefix)
            return run.ledger(pipeline), pipeline.last_row

    @ray.method(concurrency_group="control")
    def stage(self, to: Path, offset: int, piece: bytes) -> None:
        """Writes a piece of a file from another node."""
        artifacts.put_piece(to, offset, piece)

    @ray.method(concurrency_group="control")
    def log_artifact(self, folder: Path, what: Mapping[str, Any]) -> None:
        """Has an artifact logged whose files are in `folder`."""
        with self._lock:
            self._running().artifacts.log(folder, what)

    @ray.method(concurrency_group="control")
    def use_artifact(self, name: str) -> None:
        with self._lock:
            self._running().artifacts.use(name)

    def _running(self) -> Run:
        if not self._run or "ledgers" in self._run.state.facts:
            raise run_is_finished(self._letter.address.name)
        return self._run

    # Finishing

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int, failure: str | None = None, prefix: str | None = None) -> Ledgers:
        """Finishes the run, or closes the steps of one pipeline of a run that goes on.

        Raises RunFinishedError where there is no run.
        """
        try:
            with self._lock:  # a start that is under way ends first
                if not self._run:
                    raise run_is_finished(self._letter.address.name)
                run, deadline = self._run, time.monotonic() + (self._run.writer.timeout or float("inf"))
                ends = [pipeline for pipeline in run.pipelines if prefix in (None, pipeline.prefix)]
                if "ledgers" not in run.state.facts:
                    self._catch_up(deadline, closing=prefix is None)
                    run.end(ends, deadline)
                if prefix is not None:
                    return {prefix: run.ledger(run.pipeline(prefix))}
            stopped = exits.stop_file(self._letter.address.folder).exists()
            ledgers = run.finish(exits.INTERRUPTED if stopped and exit_code else exit_code, failure, deadline)
            recover.write_ledgers(self._letter.address.folder, ledgers)
            return ledgers
        except ServiceDiedError:
            os._exit(1)  # Ray repeats the call on the next actor

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """The ledgers have arrived, so nothing of this is needed any more."""
        self._forget()
        ray.actor.exit_actor()

    def _forget(self) -> None:
        self._over = True
        give_back(self._letter.address.nonce)
        with self._lock:
            if self._run:
                self._run.state.remove()
                self._run = None

    def _end_with_owner(self) -> None:
        """Finishes the run as its owner has ended. Where Ray is gone, too, it leaves this two seconds at most."""
        letter, raylet = self._letter, os.getppid()
        try:
            if self._run:
                end = self._run.inbox.owner_end or GONE
                if end == GONE and letter.job and has_ended(letter.job):
                    end = 0, None
                recover.start(letter.address.folder, orphan=True)  # in case that this process is killed first
                with contextlib.suppress(RunFinishedError):
                    self.finish(*end)
                self._forget()
            recover.clean(letter)
        except Exception as error:
            logger.warning("run %s could not be finished: %s", letter.init["id"], line(error))
        if os.getppid() != raylet:
            os._exit(0)
        ray.kill(get_runtime_context().current_actor)

    def _hear(self, warning: str) -> None:
        logger.warning("W&B run %s: %s", self._letter.address.name, warning)
        with contextlib.suppress(Exception):
            self._run.writer.run.write_logs(warning)


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its owner until the run is finished."""
    if not issubclass(cls, PipelineActor):
        raise TypeError(f"{cls.__name__} must be derived from PipelineActor")
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    threads = {"control": 8}  # next to the one that starts the run
    # pyrefly: ignore[unexpected-keyword] - Ray's own types lack some of its options
    return ray.remote(concurrency_groups=threads, num_cpus=0, **lives)(cls)
