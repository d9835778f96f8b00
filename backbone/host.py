"""Hosts a run in the process of its pipeline actor: reads what workers log until the run is finished."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.runtime_context import get_runtime_context

from . import exits, nodes, recover, wandb_internals
from .files import LEDGERS, move_in, read_letter
from .inbox import GONE, HOME
from .ledger import Ledgers, RunFinishedError, account, line
from .page import is_alive
from .ray_internals import has_ended, ray_answers, which_ray
from .reading import Reading
from .relay import Relays
from .run import Run
from .takeover import GivenUpError, open_run
from .writer import ServiceDiedError

logger = logging.getLogger("wandb_run")


class Host:
    """Has a run, the outboxes at home, and the relays of other nodes. Whoever uses them has the `lock`.

    folder: the run's private one.
    """

    def __init__(self, folder: Path):
        self._letter = read_letter(folder)
        move_in(self._letter)
        self.lock = threading.RLock()
        self.run: Run | None = None
        self._relays: Relays | None = None
        if (folder / "pipelines").exists():  # else no actor before this one has begun it
            try:
                self.begin()
            except GivenUpError:
                raise  # out of a constructor: Ray does not restart it any more
            except Exception as error:  # it dies, and tries again until it has given up
                logger.warning("the pipeline actor can't go on: %s", line(error))
                os._exit(1)
        threading.Thread(target=self._read_on, daemon=True).start()
        threading.Thread(target=self._look_around, daemon=True).start()

    def begin(self) -> None:
        """Starts the run, or goes on with what a dead actor has left."""
        address, init = self._letter.address, self._letter.init
        stop = dict(stop_fn=(address.folder / exits.STOP).touch)  # called when "Stop run" is pressed
        settings = wandb_internals.with_endpoints(init["settings"], *nodes.node_metrics())
        run = open_run(init | dict(settings=settings | stop), address, self._letter.process, self.lock, self._hear)
        self.run, self._relays = run, Relays(address, run.inbox.positions, run.inbox.place_is_gone)

    def _hear(self, warning: str) -> None:
        logger.warning("W&B run %s: %s", self._letter.address.name, warning)
        with contextlib.suppress(Exception):
            self.run.writer.run.write_logs(warning)

    # Reading

    def _read_on(self) -> None:
        """Reads as often as there is something, less often where there is nothing, until the owner has ended."""
        pause, readings, seen_alive = 0.02, [], time.monotonic()
        while True:
            with self.lock:
                began = time.monotonic()
                if self.run and not self.run.reader.is_closed:
                    readings, seen_alive = self._read(), began
                    is_over = self.run.state.facts.get("owner_end") is not None
                else:
                    readings = []
                    if is_alive(self._letter.address.folder, self._letter.process):
                        seen_alive = began
                    is_over = began > seen_alive + 5  # an owner's call of `leave` may take so long to arrive
            if is_over:
                return self._end_with_owner()  # without the lock, which the artifacts need
            pause = 0.02 if any(not reading.is_empty for _, reading in readings) else min(0.5, 1.2 * pause)
            is_cut = any(reading.is_cut for _, reading in readings)
            # Others need the lock, too: this has it for a fifth of the time at most, unless there is much to read.
            time.sleep(0.001 if is_cut else max(pause, 4 * (time.monotonic() - began)))

    def _read(self, look: bool = False) -> Sequence[tuple[str, Reading]]:
        """One reading, with what relays have brought. A fault ends this process: the next goes on from the state."""
        try:
            self.run.paused = bool(self._relays.silent(5))
            brought = self._relays.brought()
            self.run.inbox.know(self._relays.places)
            readings = self.run.read(brought, look)
        except sqlite3.OperationalError as error:
            self.run.state.warn("disk", f"{line(error)}: nothing is read until that ends, training goes on")
            return []
        except Exception as error:
            logger.exception("run %s: the pipeline actor starts again: %s", self._letter.init["id"], line(error))
            os._exit(1)
        for place, _ in readings:
            self._relays.go_on(place)
        return readings

    def _look_around(self) -> None:
        """Once a second: where outboxes are, which Ray's GCS knows, and whether wandb-core is alive."""
        while True:
            with contextlib.suppress(Exception):  # a GCS that restarts
                if self._relays and which_ray():
                    self._relays.look()
            if self.run and wandb_internals.service_is_dead():
                os._exit(1)  # only a new process gets a new one
            time.sleep(1)

    # Finishing

    def finish(self, exit_code: int, failure: str | None = None, prefix: str | None = None) -> Ledgers:
        """Finishes the run, or closes the steps of one pipeline of a run that goes on.

        Raises RunFinishedError where there is no run.
        """
        folder = self._letter.address.folder
        if exit_code and (folder / exits.STOP).exists():
            exit_code = exits.INTERRUPTED
        if prefix is None:
            if (folder / LEDGERS).exists():  # another process was quicker
                return recover.read_ledgers(folder)
            threading.Thread(target=self._watch_owner, daemon=True).start()
        try:
            with self.lock:  # a start that is under way ends first
                if not self.run:
                    raise RunFinishedError("the run is finished")
                run, deadline = self.run, time.monotonic() + self.run.writer.timeout
                if not run.state.is_finished:
                    if prefix is None:
                        run.state.note(end=(exit_code, failure))  # for whoever has to go on from here
                    deadline = catch_up(run, self._relays, self._read, deadline, closing=prefix is None)
                    run.end([each for each in run.pipelines if prefix in (None, each.prefix)], deadline)
                if prefix is not None:
                    return {prefix: account(run.state, run.pipeline(prefix), lambda number: True)}
            ledgers = run.finish(exit_code, failure, deadline)
            recover.write_ledgers(folder, ledgers)
            return ledgers
        except ServiceDiedError:
            os._exit(1)  # Ray repeats the call on the next actor

    def _watch_owner(self) -> None:
        """While the run is being finished: Ray may end this process two seconds after its owner."""
        while (run := self.run) and not run.state.is_finished:
            if not is_alive(self._letter.address.folder, self._letter.process):
                recover.start(self._letter.address.folder, orphan=True)
                return
            time.sleep(0.2)

    def forget(self) -> None:
        """Nothing of the run is needed any more."""
        with self.lock:
            if self.run:
                self.run.state.remove()
                self.run = None

    def _end_with_owner(self) -> None:
        """Finishes the run as its owner has ended. Where all of Ray is gone, this process has two seconds for it."""
        letter, raylet = self._letter, os.getppid()
        try:
            if self.run:
                end = self.run.state.facts.get("owner_end") or GONE
                if end == GONE and letter.job and has_ended(letter.job):
                    end = 0, None  # a job that is through takes its workers with it, which is no failure of theirs
                with contextlib.suppress(RunFinishedError):
                    self.finish(*end)
                self.forget()
            recover.clean(letter)
        except Exception as error:
            logger.warning("run %s could not be finished: %s", letter.init["id"], line(error))
        if os.getppid() != raylet:  # which is gone, and with it whoever could end this process
            os._exit(0)
        ray.kill(get_runtime_context().current_actor)


def catch_up(run: Run, relays: Relays, read: Callable[[bool], Sequence], deadline: float, closing: bool) -> float:
    """Reads all that has been logged by now; nothing more is taken if the run is `closing`.

    deadline: which is put off as long as something comes from a run that is `closing`. Returns what it is then.
    """
    patience = deadline - time.monotonic()
    if closing:
        run.reader.close()
        if ray_answers():
            with contextlib.suppress(Exception):
                relays.close()
        else:  # it leaves this process two seconds, and who asks it for something waits
            relays.start()  # so that what was found last is among its places
            for place in run.inbox.places.union(relays.places):
                run.inbox.place_is_gone(place, "all of Ray is gone")
            relays.places.clear()
    waiting, heard = {HOME, *relays.places}, {HOME}  # a relay's first answer may be on its way since before
    while waiting & {HOME, *relays.places}:
        for place, reading in read(True):
            if closing:
                deadline = deadline if reading.is_empty else max(deadline, time.monotonic() + patience)
                done = reading.is_empty if place == HOME else reading.is_last
            else:  # others may log on and on
                done = reading.is_empty or (place in heard and not reading.is_cut)
            if done:
                waiting.discard(place)
            heard.add(place)
        for place in relays.silent(Relays.PATIENCE):
            waiting.discard(place)
            if closing:
                relays.give_up(place, f"it did not answer within {Relays.PATIENCE:.0f} s")
        if time.monotonic() > deadline:
            if closing:
                run.state.unheard("what was logged last: it could not be read in time")
            break
        time.sleep(0.005)
    return deadline
