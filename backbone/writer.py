"""The W&B run: started online or not, given each row under its number, finished, and looked up on the disk."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import media, transaction_log, wandb_internals
from .ledger import kept, line
from .said import TELL, Said
from .starting import Axes, wandb_init
from .state import Row, State
from .transaction_log import TransactionLogs

if TYPE_CHECKING:  # importing it takes a second, and workers don't need it
    import wandb


PREEMPTED = 143  # exit code of a process that SIGTERM has ended


class ServiceDiedError(RuntimeError):
    """wandb-core is dead; only a new process gets a new one."""


@contextlib.contextmanager
def _death_of_service() -> Iterator[None]:
    """Raises ServiceDiedError for what wandb raises then."""
    try:
        yield
    except Exception as error:
        if wandb_internals.service_has_died(error):
            raise ServiceDiedError(line(error)) from None
        raise


class Writer:
    """The W&B run of a state. Nothing else in this process calls `run.log`, and one thread at a time calls this."""

    WRITING: ClassVar = 10.0  # seconds that wandb-core has for what is left to be written

    def __init__(self, state: State, init: dict[str, Any]):
        self._state, self._init = state, init
        self.logs = TransactionLogs(state.facts.get("paths", ()))
        self.run: wandb.Run = None
        self.timeout = 60.0  # seconds that `finish` has

    # Starting

    def start(self, pipelines: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        """Starts the run, or goes on with that of these pipelines; logs what is in the state and not in the run."""
        facts = self._state.facts
        mine = facts.get("paths", [])
        found = transaction_log.folders(Path(self._init["dir"], "wandb"), self._init["project"], self._init["id"])
        self._before = [path for path in found if str(path) not in mine]
        run, self.timeout = wandb_init(self._state, self._init)
        self.run, self.axes = run, Axes(run)
        mode = "disabled" if run.disabled else "offline" if run.offline else "online"
        own = [] if run.disabled else [run.sync_dir]
        before = TransactionLogs(self._before).numbers
        first = max(run.starting_step, 1 + max(before, default=-1), facts.get("first", 0))
        url = (run.url if mode == "online" else None) or facts.get("url")
        self._state.note(id=run.id, name=run.name or self._init.get("name") or run.id, url=url)
        self._state.note(mode=mode, paths=mine + own, first=first, begun=True)
        self.logs.add(own)
        for prefix, best in pipelines:
            self.axes.define(prefix, best)
        self._log_missing(mode)

    def _log_missing(self, mode: str) -> None:
        """Logs the rows that are in the state, and that W&B has not got."""
        if mode == "online":  # what a dead actor has left in its folder may not have been sent
            first = self.run.starting_step
            missing = self._state.missing(lambda number: number < first, first - 1)
        else:
            self._state.arrived(self.logs.numbers.intersection(self._state.waiting()))
            missing = self._state.missing(self.has, max(self.logs.numbers, default=-1))
        for row in missing:
            self.log(row)

    def resumed(self, prefix: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What there was of a pipeline before, if the run is resumed: by its last ledger here, and on the server."""
        if (self._init.get("resume") or os.environ.get("WANDB_RESUME") or "never") == "never":
            return {}, {}
        ledgers, unknown = kept(self._before)
        if self._state.facts["mode"] == "offline" and TransactionLogs(unknown).numbers:
            self._state.warn("totals", f"totals and best values lack the rows of {unknown[0].name}: no ledger has them")
        return ledgers.get(prefix, {}), dict(self.run.summary) if self.run.resumed else {}

    # Rows

    def tell(self, said: Said) -> None:
        """Gives the run what workers have said besides metrics. What W&B refuses of it is told, the rest goes on.

        Raises ServiceDiedError if wandb-core is dead.
        """
        for kind, value in said.take_news():
            if why := _refusal(f"the {kind} {value!r:.60}", functools.partial(TELL[kind], self.run, value)):
                self._state.note(refused=self._state.facts.get("refused", 0) + 1)
                self._state.warn(f"refused {kind}", why)

    def log(self, row: Row) -> None:
        """Gives a row to the run. What W&B refuses of it is counted, the rest of it stays.

        Raises ServiceDiedError if wandb-core is dead.
        """
        tables = media.growing_tables(row.metrics)
        increments = self._state.facts.get("increments", {})
        for key, table in tables.items():
            media.continue_table(table, increments.get(key, ()), row.number, self.run.resumed)
        with _death_of_service():
            self.axes.name(row.metrics)
        plain = {key: value for key, value in row.metrics.items() if isinstance(value, int | float | str)}
        refused: dict[str, str] = {}  # key -> why
        for key, value in row.metrics.items():
            if key not in plain and (why := self._log({key: value}, row.number, commit=False)):
                refused[key] = why  # one by one, because none can be logged a second time
        media.remove_copied_files(row.metrics.values())
        warnings = dict(refused)
        if why := self._log(plain | {"_timestamp": row.wall_time}, row.number, commit=True):
            refused |= dict.fromkeys(plain, why)
            warnings[next(iter(plain), "")] = why
        if refused and self._state.refuse(row.number, len(refused)):
            for key, why in warnings.items():
                self._state.warn(f"refused {key}", why)
        kept = tables.keys() - refused
        logged = {key: media.logged_increments(tables[key], increments.get(key, ()), row.number) for key in kept}
        if logged:
            self._state.note(increments=increments | logged)

    def _log(self, metrics: dict[str, Any], number: int, commit: bool) -> str:
        """Why W&B refuses it; nothing if it doesn't."""
        what = f"a value of {next(iter(metrics))!r}"
        return _refusal(what, lambda: self.run.log(metrics, step=number, commit=commit))

    # The end

    def finish(self, exit_code: int, failure: str | None, summary: Mapping[str, Any], deadline: float) -> None:
        """Finishes the run, and waits for the upload until `deadline`, then until all is on the disk.

        failure: what went wrong; its first line is for the run's summary, the rest for its Logs. Raises
        ServiceDiedError if wandb-core is dead, or has not written all rows.
        """
        facts, uploaded = self._state.facts, False
        try:
            with _death_of_service():
                if failure:
                    summary = {**summary, "failure": failure.partition("\n")[0]}
                    self.run.write_logs(failure)
                self.run.summary.update(summary)
                if exit_code == PREEMPTED:
                    self.run.mark_preempting()  # so that a sweep queues it again
                _within(max(1.0, deadline - time.monotonic()), lambda: self.run.finish(exit_code))
            began_offline = any(Path(path).name.startswith("offline-") for path in facts["paths"])
            uploaded = facts["mode"] == "online" and not began_offline
        except TimeoutError:
            self._state.warn("timeout", f"the upload did not end within {self.timeout:.0f} s")
        try:
            with _death_of_service():
                wandb_internals.end_service(self.WRITING)
        except TimeoutError:
            late = f"wandb-core did not end within {self.WRITING:.0f} s: the last rows may be missing"
            self._state.warn("service", late)
        if uploaded and wandb_internals.upload_was_refused(Path(facts["paths"][-1])):
            uploaded = False
            self._state.warn("upload", "the W&B server refused the upload")
        self._state.note(uploaded=uploaded)
        self._check()

    def _check(self) -> None:
        """Raises ServiceDiedError, once: a wandb-core whose disk was full for a moment writes nothing after that."""
        facts = self._state.facts
        if facts["mode"] == "offline" and not facts.get("tried_again"):
            self.logs.look()
            self._state.note(tried_again=True)
            with contextlib.suppress(sqlite3.Error):
                self._state.commit()
                if not all(map(self.has, self._state.waiting())):
                    raise ServiceDiedError("wandb-core has not written all rows")

    def has(self, number: int) -> bool:
        """Whether W&B has the row of this number: in a transaction log here, or on the server."""
        mode = self._state.facts.get("mode")
        below = self.run.starting_step if self.run and mode == "online" else 0
        return mode == "disabled" or number < below or number in self.logs.numbers


def _refusal(what: str, call: Callable[[], object]) -> str:
    """Why W&B refuses something; nothing if it doesn't. Raises ServiceDiedError if wandb-core is dead."""
    try:
        with _death_of_service():
            call()
    except ServiceDiedError:
        raise
    except Exception as error:
        return f"W&B refused {what}: {line(error)}"
    return ""


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Raises TimeoutError if a call takes longer, and what the call raises."""
    done: Future[object] = Future()

    def target() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    done.result(None if math.isinf(seconds) else seconds)
