"""The W&B run: started online or not, given each row under its number, finished, and looked up on the disk."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import media, transaction_log, wandb_internals
from .ledger import line
from .said import Said
from .state import Row, State
from .transaction_log import Tail

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


def _within(seconds: float, call: Callable[..., object], *arguments: Any) -> None:
    """Raises TimeoutError if a call takes longer, and what the call raises."""
    done: Future[object] = Future()

    def target() -> None:
        try:
            done.set_result(call(*arguments))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    done.result(None if math.isinf(seconds) else seconds)


class Writer:
    """The W&B run of a state. Nothing else in this process calls `run.log`, and one thread at a time calls this.

    stop: is called, in another thread, when somebody presses "Stop run" on the run's page.
    """

    WRITING: ClassVar = 10.0  # seconds that wandb-core has for what is left to be written

    def __init__(self, state: State, init: dict[str, Any], stop: Callable[[], None] | None = None):
        self._state, self._init, self._stop = state, init, stop
        self._folder = Path(init["dir"], "wandb")
        self._named: dict[str, set[str]] = {}  # prefix -> keys that have been defined by name
        self._increments: dict[str, list[tuple[int, str]]] = state.facts.get("increments", {})  # of tables, by key
        self._tails = [Tail(Path(path)) for path in state.facts.get("paths", ())]
        self._there: set[int] = set()  # numbers of rows that are in the transaction logs of this run's folders
        self.look()
        self.run: wandb.Run = None
        self.timeout = 60.0  # seconds that `finish` has; 0 for no limit

    # Starting

    def start(self, pipelines: Sequence[tuple[str, Mapping[str, str]]] = ()) -> None:
        """Starts the run, or goes on with that of these pipelines; logs what is in the state and not in the run."""
        facts = self._state.facts
        mine = facts.get("paths", [])
        self._before = [
            path for path in transaction_log.folders(self._folder, self._init["id"]) if str(path) not in mine
        ]
        run = self.run = self._wandb_init(restart=facts.get("begun", False))  # in this life of the id
        mode = "disabled" if run.disabled else "offline" if run.offline else "online"
        before = transaction_log.numbers(self._before)
        first = max(run.starting_step, 1 + max(before, default=-1), facts.get("first", 0))
        self._state.note(
            id=run.id,
            name=run.name or self._init.get("name") or run.id,
            mode=mode,
            url=(run.url if mode == "online" else None) or facts.get("url"),
            paths=mine + ([] if run.disabled else [run.sync_dir]),
            first=first,
            begun=True,
        )
        self._tails += [] if run.disabled else [Tail(Path(run.sync_dir))]
        for i, (prefix, best) in enumerate(pipelines):
            self.define(prefix, [other for other, _ in pipelines[:i]], best)
        if mode == "online":  # what a dead actor has left in its folder may not have been sent
            there, highest = range(run.starting_step).__contains__, run.starting_step - 1
        else:
            there, highest = self.there(), max(self._there, default=-1)
        for row in self._state.missing(there, highest):
            self.log(row)

    def _wandb_init(self, restart: bool) -> wandb.Run:
        import wandb

        init = self._to_go_on() if restart else self._init
        settings = init["settings"]
        defaults = dict(silent=True, console="off", console_multipart=True, init_timeout=10, finish_timeout=60)
        settings = wandb_internals.unless_said(defaults | wandb_internals.repository()) | settings
        self.timeout = float(settings.get("finish_timeout") or wandb_internals.session_settings().finish_timeout)
        settings |= dict(finish_timeout_raises=True)
        if stop := self._stop:
            settings["stop_fn"] = lambda: stop()  # noqa: PLW0108 - wandb copies settings, and a method's object with them
        init = init | dict(settings=wandb.Settings(**settings), reinit="create_new")
        before = transaction_log.folders(self._folder, init["id"], begun=True)
        try:
            run = wandb.init(**init)
        except wandb.Error as error:
            if not wandb_internals.is_unreachable(error):  # the server answers, and says no
                raise
            away = f"the W&B server does not answer, so the run is kept here (offline): {line(error)}"
            self._state.warn("offline", away)
            wandb.teardown()  # its service would not take the id a second time
            for empty in transaction_log.folders(self._folder, init["id"], begun=True):
                if empty not in before:
                    shutil.rmtree(empty)
            run = wandb.init(**init | dict(mode="offline"))
        if not run.disabled:  # else artifacts are staged in the home folder, and gone when `wandb sync` needs them
            for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
                os.environ[name] = os.environ.get(name) or f"{run.sync_dir}/artifacts"
            with contextlib.suppress(FileExistsError), open(self._folder / ".gitignore", "x") as file:
                file.write("*\n")  # Ray, too, obeys it, and would bring all runs along in a job's working directory
        return run

    def _to_go_on(self) -> dict[str, Any]:
        """Arguments for a run that goes on by itself. What has been edited in the app meanwhile stays as it is.

        To be called before wandb reads the environment, which it does once.
        """
        init = self._init | dict(resume="allow", mode=self._state.facts["mode"])
        if init["mode"] == "online":
            for name in ("name", "notes", "tags", "config"):
                init.pop(name, None)
                os.environ.pop(f"WANDB_{name.upper()}", None)
        return init

    def define(self, prefix: str, others: Iterable[str], best: Mapping[str, str]) -> None:
        """Gives a pipeline's keys their step axis. others: prefixes of the pipelines that are there.

        best: key -> max or min, which the runs' table shows beside the last value.

        Which of two overlapping globs wins is undefined, so beside bare keys (`*`) each key is defined by its name.
        """
        if prefix and "" in others:
            self._named[prefix] = {f"{prefix}step", f"{prefix}workers"}
        else:
            self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step", step_sync=False)
        self.run.define_metric(f"{prefix}step", hidden=True)
        for key, op in best.items():
            axis = f"{prefix}step"
            self.run.define_metric(f"{prefix}{key}", step_metric=axis, step_sync=False, summary=f"{op},last")
        self.run.define_metric(f"{prefix}workers", step_metric=f"{prefix}step", step_sync=False, hidden=True)

    def totals(self, prefix: str) -> dict[str, float]:
        """A pipeline's running sums, if the run is resumed."""
        if not (self._init.get("resume") or os.environ.get("WANDB_RESUME")):
            return {}
        here = [transaction_log.last_values(path) for path in self._before]  # the last one may lack some
        there = [dict(self.run.summary)] if self.run.resumed else []
        return transaction_log.totals(functools.reduce(operator.or_, here + there, {}), prefix)

    def best(self, prefix: str, best: Mapping[str, str]) -> dict[str, float]:
        """A pipeline's best values, if the run is resumed. best: key -> max or min."""
        if not (self._init.get("resume") or os.environ.get("WANDB_RESUME")):
            return {}
        found = {}
        for key, op in best.items():
            values = [value for path in self._before for value in transaction_log.values(path, prefix + key)]
            there = self.run.summary.get(prefix + key) if self.run.resumed else None
            values += [there[op]] if there and op in there else []
            if values:
                found[key] = {"max": max, "min": min}[op](values)
        return found

    # Rows

    def tell(self, said: Said) -> None:
        """Gives the run what workers have said besides metrics."""
        with _death_of_service():
            said.tell(self.run)

    def log(self, row: Row) -> None:
        """Gives a row to the run. What W&B refuses of it is counted, the rest of it stays.

        Raises ServiceDiedError if wandb-core is dead.
        """
        tables = self._next_increments(row)
        for prefix, known in self._named.items():
            for key in [key for key in row.metrics if key.startswith(prefix) and key not in known]:
                known.add(key)
                with _death_of_service():
                    wandb_internals.define_by_name(self.run, key, f"{prefix}step")
        plain = {key: value for key, value in row.metrics.items() if isinstance(value, int | float | str)}
        refused: dict[str, str] = {}  # key -> why
        for key, value in row.metrics.items():
            if key not in plain and (why := self._log({key: value}, row.number, commit=False)):
                refused[key] = why  # one by one, because none can be logged a second time
        media.remove_copied_files(row.metrics.values())
        warnings = list(refused.values())
        if why := self._log(plain | {"_timestamp": row.wall_time}, row.number, commit=True):
            refused |= dict.fromkeys(plain, why)
            warnings.append(why)
        if refused and self._state.refuse(row.number, len(refused)):
            for why in warnings:
                self._state.warn("refused", why)
        for key in tables.keys() - refused.keys():
            before = [(-1, path) for path in wandb_internals.increments_before(tables[key])]
            self._increments[key] = [*before, (row.number, wandb_internals.increment_path(tables[key]))]
            self._state.note(increments=self._increments)

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

    def finish(self, exit_code: int, failure: str | None, summary: Mapping[str, Any], deadline: float) -> None:
        """Finishes the run, and waits for the upload until `deadline`, then until all is on the disk.

        failure: what went wrong; its first line is for the run's summary, the rest for its Logs. Raises
        ServiceDiedError if wandb-core is dead.
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
                _within(max(1.0, deadline - time.monotonic()), self.run.finish, exit_code)
            uploaded = facts["mode"] == "online" and not any(
                Path(p).name.startswith("offline-") for p in facts["paths"]
            )
        except TimeoutError:
            self._state.warn("timeout", f"the upload did not end within {self.timeout:.0f} s")
        try:
            with _death_of_service():
                wandb_internals.end_service(self.WRITING)
        except TimeoutError:
            self._state.warn(
                "service", f"wandb-core did not end within {self.WRITING:.0f} s: the last rows may be missing"
            )
        if uploaded and wandb_internals.upload_was_refused(Path(facts["paths"][-1])):
            uploaded = False
            self._state.warn("upload", "the W&B server refused the upload")
        self._state.note(uploaded=uploaded)

    @property
    def rows(self) -> int:
        """How many are in the transaction logs."""
        return len(self._there)

    def look(self) -> list[int]:
        """Reads on in the transaction logs; the numbers of rows that have come."""
        new = [number for tail in self._tails for number in tail.numbers()]
        self._there.update(new)
        return new

    def there(self) -> Callable[[int], bool]:
        """Says of a row's number whether W&B has it: in a transaction log here, or on the server."""
        mode = self._state.facts.get("mode")
        below = self.run.starting_step if self.run and mode == "online" else 0
        return lambda number: mode == "disabled" or number < below or number in self._there
