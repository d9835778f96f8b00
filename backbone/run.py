"""A run with its pipelines: what is in the store, closed by step, given to W&B and accounted for. Without Ray, so that
whoever finds the store of a dead actor goes on by the same code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import disk
from .artifacts import Artifacts
from .files import store_path
from .ledger import Ledger, Ledgers
from .pipeline import Pipeline
from .reduction import Reduction
from .store import Row, Store
from .writer import Writer

DEATHS = 3  # of a pipeline actor in a row; after more it is given up


class GivenUpError(RuntimeError):
    """The pipeline actor dies whenever it goes on."""


class Started(NamedTuple):
    """What the owner of a run learns of it."""

    ledger: Ledger
    config: dict[str, Any]
    project: str


class Run:
    """A run as it is in a store, and its writer.

    lock: whoever has it may call this. stop: see `Writer`.
    """

    def __init__(
        self,
        store: Store,
        init: dict[str, Any],
        lock: threading.Condition | threading.RLock,
        stop: Callable[[], None] | None = None,
    ):
        self.store, self._lock = store, lock
        self.pipelines = Pipeline.all(store)
        self.writer = Writer(store, init, stop)
        self.artifacts: Artifacts = None  # until `start`

    @classmethod
    def open(
        cls, life: str, init: dict[str, Any], lock: threading.Condition | threading.RLock, stop: Callable[[], None]
    ) -> Run:
        """Opens what an actor before this one has left of the run, if there was one, and counts the restart.

        life: another one for each time that a process makes a run of this id. Raises GivenUpError after some deaths of
        actors without a row in between.
        """
        folder = Path(init["dir"], "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(store_path(folder, init["id"]))
        if store.facts.get("life") != life and "ledgers" in store.facts:  # the run of an earlier process, finished
            store.remove()
            store = Store(store.path)
        facts, run = store.facts, cls(store, init, lock, stop)
        if facts.get("life") == life:
            rows = len(disk.numbers(facts.get("paths", ())))
            deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
            store.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
            if deaths > DEATHS:
                raise GivenUpError(f"given up: the pipeline actor died {deaths} times without a row in between")
        else:  # a new run, or that of an earlier process which did not finish it
            for pipeline in run.pipelines.values():
                pipeline.end()
            store.note(life=life, deaths=0)
        return run

    def start(self) -> None:
        """Starts it with W&B, or goes on, unless it is finished."""
        if "ledgers" not in self.store.facts:
            try:
                self.writer.start(self.pipelines)
            except Exception:
                left = self.pipelines or self.store.facts.get("restarts")  # by an actor that died
                self.store.close() if left else self.store.remove()
                raise
        self.artifacts = Artifacts(self.store, self.writer, self._lock)

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline, or goes on with it."""
        if prefix not in self.pipelines:
            self.writer.define(prefix, self.pipelines)
            self.pipelines[prefix] = Pipeline(self.store, prefix, reduction)
        self.pipelines[prefix].begin(reduction, workers, self.writer.totals(prefix))
        run = self.writer.run
        return Started(ledger(self.store, self.pipelines[prefix]), dict(run.config), run.project)

    def log(self, rows: Iterable[Row]) -> None:
        """Gives rows to W&B. Raises ServiceDiedError if wandb-core is dead."""
        for row in rows:
            self.writer.log(row)

    # The end

    def end(self, pipelines: Sequence[Pipeline]) -> None:
        """Closes the steps of pipelines, with the reports that came."""
        for pipeline in pipelines:
            if not pipeline.ended:
                self.log(pipeline.end())

    def finish(self, exit_code: int, failure: str | None = None) -> Ledgers:
        """Finishes it with W&B, when its pipelines have ended.

        Must be called without the lock, which the artifacts need. Raises ServiceDiedError if wandb-core is dead.
        """
        self.artifacts.finish(self.writer.timeout)
        with self._lock:
            if "ledgers" not in self.store.facts:
                self.writer.finish(exit_code, failure)
                self.conclude(self.writer.there)
            return self.store.facts["ledgers"]

    def conclude(self, there: Callable[[], Callable[[int], bool]]) -> None:
        """Makes the ledgers. They stay in the store until they have arrived."""
        deadline = time.monotonic() + 3
        while True:
            now = there()
            ledgers = {prefix: ledger(self.store, pipeline, now) for prefix, pipeline in self.pipelines.items()}
            lost = sum(account.lost for account in ledgers.values())
            if not lost or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # a wandb-core that could not be waited for may still be writing
        if lost:
            self.store.warn("lost", f"{lost} reports are in no row")
        for account in ledgers.values():
            account.warnings = self.store.warnings
        self.store.note(ledgers=ledgers)


def ledger(store: Store, pipeline: Pipeline, there: Callable[[int], bool] | None = None) -> Ledger:
    """A pipeline's account: so far, or at the end, when it is known which rows are `there`."""
    facts, counts = store.facts, pipeline.counts
    known = ("name", "id", "mode", "url", "restarts", "uploaded", "lost_artifacts", "gone")
    account = Ledger(**{"name": "", "id": ""} | {field: facts[field] for field in known if field in facts})
    account.paths = [*map(Path, facts.get("paths", ()))]
    account.prefix, account.warnings = pipeline.prefix, store.warnings
    for field in ("reports", "rows", "partial", "repeats", "lost_values", "silent"):
        setattr(account, field, counts[field])
    if there:
        found = store.account(pipeline.prefix, there)
        account.reports, account.rows = pipeline.inbox.said, found["rows"]
        account.lost = account.reports - found["reports"]
        account.lost_values += found["lost_values"]
    return account
