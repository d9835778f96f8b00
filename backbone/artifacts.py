"""Artifacts: their files staged in the run's folder, a queue in the state, and threads of their own.

wandb blocks when the server is away, and an artifact that is used may still be on its way there.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import shutil
import sqlite3
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import media, transaction_log, values, wandb_internals
from .ledger import line
from .state import State

if TYPE_CHECKING:
    from .writer import Writer


class Artifacts:
    """What is to be logged or used, in order; over a restart of the actor each once.

    lock: whoever has it may use the state.
    """

    def __init__(self, state: State, writer: Writer, lock: threading.RLock):
        self._state, self._writer, self._lock = state, writer, lock
        self._threads = {"log_artifact": ThreadPoolExecutor(1), "use_artifact": ThreadPoolExecutor(1)}
        self._futures: list[Future] = []
        self._finishing = threading.Lock()
        self._last = 0  # of those that are begun
        [(begun,)] = state.db.execute("SELECT count(client) FROM artifacts")
        paths = state.facts["paths"] if begun and state.facts["mode"] == "offline" else ()
        self._on_disk = set().union(*map(transaction_log.artifacts, map(Path, paths)))
        self.go_on()

    def go_on(self) -> None:
        """Begins with what has come since the last call, and in the first one with what a dead actor has left."""
        query, facts = "SELECT * FROM artifacts WHERE id > ? ORDER BY id", self._state.facts
        is_on = not self._state.is_finished and facts["mode"] != "disabled"
        for id_, task, client, done in self._state.db.execute(query, (self._last,)).fetchall():
            self._last = id_
            kind, what = pickle.loads(task)
            if done and kind == "log_artifact":
                shutil.rmtree(what["folder"], ignore_errors=True)  # the actor may have died before it did that
            elif not done and client not in self._on_disk and is_on:
                work = {"log_artifact": self._log, "use_artifact": self._use}[kind]
                self._futures.append(self._threads[kind].submit(work, id_, **what))

    def _log(self, id_: int, name: str, type: str, metadata: dict, aliases: list, folder: str, **content: Any) -> None:
        import wandb

        artifact = wandb.Artifact(name, type, metadata=metadata)
        for file in content["files"]:
            artifact.add_file(f"{folder}/{file}", file, policy="immutable", skip_cache=True)
        for file, reference in content["references"].items():
            wandb_internals.add_reference(artifact, file, reference)
        for file, value in values.unpack(content["objects"]).items():
            artifact.add(value, file)
            if excess := media.excess(value):
                with self._lock:
                    self._state.note(lost_artifacts=self._state.facts.get("lost_artifacts", 0) + 1)
                    self._state.warn("artifact", f"{file!r} of artifact {name!r} has {excess}")
        media.remove_copied_files([artifact])
        self._note("client = ?", wandb_internals.client_id(artifact), id_)
        logged = self._writer.run.log_artifact(artifact, aliases=aliases)
        if self._state.facts["mode"] == "online":
            logged.wait()  # else a restart could bring it a second time, and its aliases back
            self._note("done = ?", 1, id_)
            shutil.rmtree(folder, ignore_errors=True)  # offline `wandb sync` needs the copies

    def _use(self, id_: int, name: str) -> None:
        deadline = time.monotonic() + self._writer.timeout
        while self._state.facts["mode"] == "online":
            try:
                self._writer.run.use_artifact(name)
                break
            except Exception:  # the run that makes it may not have uploaded it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        self._note("done = ?", 1, id_)

    def _note(self, change: str, value: Any, id_: int) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._state.db.execute(f"UPDATE artifacts SET {change} WHERE id = ?", (value, id_))

    def finish(self, deadline: float) -> None:
        """Waits for all of them; counts those that were not possible."""
        timeout = max(0.0, deadline - time.monotonic())
        with self._finishing:  # whoever finishes as well waits, too
            futures, self._futures = self._futures, []
            done, late = wait(futures, None if math.isinf(timeout) else timeout)
            errors = [future.exception() for future in done if future.exception()]
            if failed := len(errors) + len(late):
                self._state.note(lost_artifacts=self._state.facts.get("lost_artifacts", 0) + failed)
                why = line(errors[0]) if errors else f"not possible within {timeout:.0f} s"
                where = f"{self._state.facts['paths'][-1]}/artifacts"
                self._state.warn("artifacts", f"{failed} artifacts were not logged or used: {why}; see {where}")
