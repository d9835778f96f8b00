"""The W&B run: started online or not, given each row under its number, finished, and looked up on the disk."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import disk, media, transaction_log, wandb_internals
from .ledger import line
from .store import Row, Store

if TYPE_CHECKING:  # importing it takes a second, and workers don't need it
    import wandb


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
    """The W&B run of a store. Nothing else in this process calls `run.log`, and one thread at a time calls this.

    stop: is called, in another thread, when somebody presses "Stop run" on the run's page.
    """

    WRITING: ClassVar = 10.0  # seconds that wandb-core has for what is left to be written

    def __init__(self, store: Store, init: dict[str, Any], stop: Callable[[], None] | None = None):
        self._store, self._init, self._stop = store, init, stop
        self._folder = Path(init["dir"], "wandb")
        self._named: dict[str, set[str]] = {}  # prefix -> keys that have been defined by name
        self._increments: dict[str, list[tuple[int, str]]] = store.facts.get("increments", {})  # of tables, by key
        self.run: wandb.Run = None
        self.timeout = 30.0  # seconds for the artifacts, and again for the rows

    # Starting

    def start(self, prefixes: Iterable[str] = ()) -> None:
        """Starts the run, or goes on with that of these pipelines; logs what is in the store and not in the run."""
        facts = self._store.facts
        mine = facts.get("paths", [])
        self._before = [path for path in disk.folders(self._folder, self._init["id"]) if str(path) not in mine]
        run = self.run = self._wandb_init(restart=bool(mine))
        mode = "disabled" if run.disabled else "offline" if run.offline else "online"
        first = max(run.starting_step, 1 + max(disk.numbers(self._before), default=-1), facts.get("first", 0))
        self._store.note(
            id=run.id,
            name=run.name or self._init.get("name") or run.id,
            mode=mode,
            url=(run.url if mode == "online" else None) or facts.get("url"),
            paths=mine + ([] if run.disabled else [run.sync_dir]),
            first=first,
        )
        for i, prefix in enumerate(prefixes := list(prefixes)):
            self.define(prefix, prefixes[:i])
        if mode == "online":
            there, highest = range(run.starting_step).__contains__, run.starting_step - 1
        else:
            numbers = disk.numbers(mine)
            there, highest = numbers.__contains__, max(numbers, default=-1)
        for row in self._store.missing(there, highest) if mine else ():
            self.log(row)

    def _wandb_init(self, restart: bool) -> wandb.Run:
        import wandb

        settings = self._init["settings"]
        defaults = dict(silent=True, console="off", init_timeout=10, finish_timeout=60)
        settings = wandb_internals.unless_said(defaults | wandb_internals.repository()) | settings
        self.timeout = float(settings.get("finish_timeout") or wandb_internals.session_settings().finish_timeout) / 2
        settings |= dict(finish_timeout=self.timeout, finish_timeout_raises=True)
        if stop := self._stop:
            settings["stop_fn"] = lambda: stop()  # noqa: PLW0108 - wandb copies settings, and a method's object with them
        init = self._init | dict(settings=wandb.Settings(**settings), reinit="create_new")
        init |= dict(resume="allow") if restart else {}
        before = disk.folders(self._folder, init["id"], begun=True)
        try:
            run = wandb.init(**init)
        except wandb.Error as error:
            if not wandb_internals.is_unreachable(error):  # the server answers, and says no
                raise
            away = f"the W&B server does not answer, so the run is kept here (offline): {line(error)}"
            self._store.warn("offline", away)
            wandb.teardown()  # its service would not take the id a second time
            for empty in disk.folders(self._folder, init["id"], begun=True):
                if empty not in before:
                    shutil.rmtree(empty)
            run = wandb.init(**init | dict(mode="offline"))
        if not run.disabled:  # else artifacts are staged in the home folder, and gone when `wandb sync` needs them
            os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = f"{run.sync_dir}/artifacts"
        return run

    def define(self, prefix: str, others: Iterable[str]) -> None:
        """Gives a pipeline's keys their step axis. `others`: prefixes of the pipelines that are there.

        Which of two overlapping globs wins is undefined, so beside bare keys (`*`) each key is defined by its name.
        """
        if prefix and "" in others:
            self._named[prefix] = {f"{prefix}step", f"{prefix}workers"}
        else:
            self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self.run.define_metric(f"{prefix}step", hidden=True)
        self.run.define_metric(f"{prefix}workers", step_metric=f"{prefix}step", hidden=True)

    def totals(self, prefix: str) -> dict[str, float]:
        """A pipeline's running sums, if the run is resumed."""
        if not (self._init.get("resume") or os.environ.get("WANDB_RESUME")):
            return {}
        here = [transaction_log.last_values(path) for path in self._before]  # the last one may lack some
        there = [dict(self.run.summary)] if self.run.resumed else []
        return disk.totals(functools.reduce(operator.or_, here + there, {}), prefix)

    # Rows

    def log(self, row: Row) -> None:
        """Gives a row to the run. What W&B refuses of it is counted, the rest of it stays.

        Raises ServiceDiedError if wandb-core is dead.
        """
        tables = self._next_increments(row)
        for prefix, known in self._named.items():
            for key in [key for key in row.metrics if key.startswith(prefix) and key not in known]:
                known.add(key)
                with _death_of_service():
                    self.run.define_metric(key, step_metric=f"{prefix}step")
        plain = {key: value for key, value in row.metrics.items() if isinstance(value, int | float | str)}
        refused: dict[str, str] = {}  # key -> why
        for key, value in row.metrics.items():
            if key not in plain and (why := self._log({key: value}, row.number, commit=False)):
                refused[key] = why  # one by one, because none can be logged a second time
        media.remove_copied_files(row.metrics.values())
        warnings = list(refused.values())
        if why := self._log(plain, row.number, commit=True):
            refused |= dict.fromkeys(plain, why)
            warnings.append(why)
        if refused and self._store.refuse(row.number, len(refused)):
            for why in warnings:
                self._store.warn("refused", why)
        for key in tables.keys() - refused.keys():
            before = [(-1, path) for path in wandb_internals.increments_before(tables[key])]
            self._increments[key] = [*before, (row.number, wandb_internals.increment_path(tables[key]))]
            self._store.note(increments=self._increments)

    def _log(self, metrics: dict[str, Any], number: int, commit: bool) -> str:
        """Why W&B refuses it; nothing if it doesn't."""
        try:
            with _death_of_service():
                self.run.log(metrics, step=number, commit=commit)
        except ServiceDiedError:
            raise
        except Exception as error:
            return f"W&B refused a value of {next(iter(metrics))!r}: {line(error)}"
        return ""

    def _next_increments(self, row: Row) -> dict[str, wandb.Table]:
        """The incremental tables of a row, each made the increment behind those of the rows before."""
        tables = {key: value for key, value in row.metrics.items() if getattr(value, "log_mode", None) == "INCREMENTAL"}
        for key, table in tables.items():
            logged = [path for number, path in self._increments.get(key, ()) if number < row.number]
            if logged or not self.run.resumed:  # else wandb looks itself
                wandb_internals.continue_table(table, logged)
        return tables

    # The end

    def finish(self, exit_code: int, failure: str | None = None) -> None:
        """Finishes the run, and waits for the upload as long as `timeout` says, then until all is on the disk.

        failure: what went wrong, for the run's summary. Raises ServiceDiedError if wandb-core is dead.
        """
        facts, uploaded = self._store.facts, False
        try:
            with _death_of_service():
                if failure:
                    self.run.summary["failure"] = failure
                self.run.finish(exit_code)
            uploaded = facts["mode"] == "online" and not any(
                Path(p).name.startswith("offline-") for p in facts["paths"]
            )
        except TimeoutError:
            self._store.warn("timeout", f"the upload did not end within {self.timeout:.0f} s")
        try:
            with _death_of_service():
                wandb_internals.end_service(self.WRITING)
        except TimeoutError:
            self._store.warn(
                "service", f"wandb-core did not end within {self.WRITING:.0f} s: the last rows may be missing"
            )
        if uploaded and wandb_internals.upload_was_refused(Path(facts["paths"][-1])):
            uploaded = False
            self._store.warn("upload", "the W&B server refused the upload")
        self._store.note(uploaded=uploaded)

    def there(self) -> Callable[[int], bool]:
        """Says of a row's number whether W&B has it: in a transaction log here, or on the server."""
        facts = self._store.facts
        below = self.run.starting_step if self.run and facts["mode"] == "online" else 0
        numbers = disk.numbers(facts.get("paths", ()))
        return lambda number: facts["mode"] == "disabled" or number < below or number in numbers
