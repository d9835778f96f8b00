"""What must survive the pipeline actor, in an SQLite file.

Steps, counts and facts are objects in memory. What changes is queued as SQL, too, and committed once for each reading
of the outboxes, before a row goes to W&B. So whoever opens the file of a dead actor goes on exactly there. What reports
and rows hold is in the file alone as soon as it is committed. Nothing is synced to the disk: what is with the kernel
outlives the process. Knows nothing of Ray and wandb. The facts are listed in takeover.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import values
from .files import is_private

logger = logging.getLogger("wandb_run")

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS outboxes (place TEXT, name TEXT, state BLOB, PRIMARY KEY (place, name));
CREATE TABLE IF NOT EXISTS pipelines (number INTEGER PRIMARY KEY, prefix TEXT, reduction BLOB, state BLOB);
CREATE TABLE IF NOT EXISTS reports (
    pipeline INTEGER, id INTEGER, wall_time REAL, who TEXT, metrics BLOB, PRIMARY KEY (pipeline, id));
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, pipeline INTEGER, reports INTEGER, refused INTEGER DEFAULT 0, wall_time REAL,
    metrics BLOB);
CREATE TABLE IF NOT EXISTS artifacts (id INTEGER PRIMARY KEY, task BLOB, client TEXT, done INTEGER DEFAULT 0);
"""


class Row(NamedTuple):
    """A row of the run, with the number that W&B knows it by (`_step`)."""

    number: int
    metrics: dict[str, Any]
    wall_time: float  # when the last of its reports was logged


class State:
    """A run's facts, warnings and rows; the tables of its outboxes, pipelines and artifacts.

    Raises OSError where another process has the state, and keeps it for `patience` seconds.
    """

    def __init__(self, path: Path, patience: float = 10.0):
        self.path, self.db = path, _database(path, patience)
        self.db.executescript(SCHEMA)
        facts = self.db.execute("SELECT * FROM facts").fetchall()
        self.facts: dict[str, Any] = {name: pickle.loads(value) for name, value in facts}
        self._queue: dict[object, tuple[str, tuple]] = {}
        (self._last,) = self.db.execute("SELECT coalesce(max(number), -1) FROM rows").fetchone()  # row's number
        self.hear: Callable[[str], None] = lambda warning: None  # is told the first warning of a kind

    def do(self, statement: str, *values: Any, key: object = None) -> None:
        """Queues a statement for the next commit. It replaces one that waits under the same key."""
        key = object() if key is None else key
        self._queue.pop(key, None)
        self._queue[key] = statement, values

    def take_back(self, key: object) -> tuple:
        """Takes a statement out of the queue; returns its values, or nothing if it has been committed."""
        return self._queue.pop(key, ("", ()))[1]

    @property
    def is_finished(self) -> bool:
        """Whether the run is: its ledgers are there."""
        return "ledgers" in self.facts

    @property
    def is_pending(self) -> bool:
        """Whether something is to be done."""
        return bool(self._queue)

    def commit(self) -> None:
        """Raises sqlite3.OperationalError where the disk is full. Then all of it stays to be done."""
        if not self._queue:
            return
        self.db.execute("BEGIN")
        try:
            for statement, values in self._queue.values():
                self.db.execute(statement, values)
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have done it itself
                self.db.execute("ROLLBACK")
            raise
        self._queue.clear()

    def note(self, **facts: Any) -> None:
        """Remembers facts of the run by name."""
        self.facts |= facts
        for name, value in facts.items():
            self.do("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, pickle.dumps(value), key=name)

    def warn(self, kind: str, what: str) -> None:
        """Counts a warning; only the first one of a kind is told."""
        known = self.facts.get("warnings", {})
        first, count = known.get(kind, (what, 0))
        self.note(warnings=known | {kind: (first, count + 1)})
        if not count:
            self.hear(what)

    def unheard(self, what: str) -> None:
        """There may be reports that nobody can read."""
        self.note(unheard=[*dict.fromkeys([*self.facts.get("unheard", ()), what])])
        self.warn(f"unheard {what}", f"reports may be missing of {what}")

    @property
    def warnings(self) -> list[str]:
        found = self.facts.get("warnings", {}).values()
        return [what if count == 1 else f"{what} ({count} times)" for what, count in found]

    def add_row(self, pipeline: int, reports: int, metrics: dict[str, Any], packed: bytes, wall_time: float) -> Row:
        """Gives a row the next number. reports: how many it stands on. packed: the metrics."""
        self._last = number = max(self.facts.get("first", 0), self._last + 1)
        columns = "(number, pipeline, reports, wall_time, metrics)"
        self.do(f"INSERT INTO rows {columns} VALUES (?, ?, ?, ?, ?)", number, pipeline, reports, wall_time, packed)
        return Row(number, metrics, wall_time)

    def arrived(self, numbers: Iterable[int]) -> None:
        """W&B has these rows, so their content is not needed any more."""
        for number in numbers:
            self.do("UPDATE rows SET metrics = NULL WHERE number = ?", number)

    def waiting(self) -> list[int]:
        """The numbers of the rows whose content is still there."""
        return [number for (number,) in self.db.execute("SELECT number FROM rows WHERE metrics IS NOT NULL")]

    def missing(self, has: Callable[[int], bool], highest: int) -> Iterator[Row]:
        """The rows that W&B lacks, in order. has: says whether it has a number. highest: the highest that it has.

        W&B drops a number below that, so such a row gets a new one, behind all others.
        """
        self.commit()
        for _, number in sorted((number < highest, number) for number in self.waiting() if not has(number)):
            new = number
            if number < highest:
                self._last = new = max(self.facts.get("first", 0), self._last + 1)
                self.db.execute("UPDATE rows SET number = ? WHERE number = ?", (new, number))
            found = self.db.execute("SELECT metrics, wall_time FROM rows WHERE number = ?", (new,)).fetchone()
            yield Row(new, values.unpack(found[0]), found[1])

    def refuse(self, number: int, values: int) -> bool:
        """Notes how many values of a row W&B has refused; whether that was not known before."""
        [(before,)] = self.db.execute("SELECT refused FROM rows WHERE number = ?", (number,))
        self.do("UPDATE rows SET refused = ? WHERE number = ?", values, number)
        return not before

    def close(self) -> None:
        self.db.close()

    def remove(self) -> None:
        self.close()
        for file in _files(self.path):
            file.unlink(missing_ok=True)


def _database(path: Path, patience: float) -> sqlite3.Connection:
    """The database at `path`, for this process alone; a new one if there is none, or what is there can't be trusted.

    patience: seconds to wait for a process that has it. Raises OSError if that does not end.
    """
    for file in _files(path):
        if os.path.lexists(file) and not is_private(file):
            _set_aside(file, "is no private file of this user")
    deadline = time.monotonic() + patience
    while True:
        try:
            return _open(path)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OSError(str(error)) from None
            time.sleep(0.1)


def _open(path: Path) -> sqlite3.Connection:
    """Raises BlockingIOError if another process has it, or has just removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    opened = os.fstat(file)
    os.close(file)
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")  # takes the lock
        database.execute("PRAGMA synchronous=OFF")
        [(state,)] = database.execute("PRAGMA quick_check(1)")  # a machine that has lost its power
        if state != "ok":
            raise sqlite3.DatabaseError(state)
    except sqlite3.OperationalError as error:
        database.close()
        if "locked" in str(error) or not path.exists():
            raise BlockingIOError(f"{path} is in use: is another run of this id going on?") from None
        raise OSError(f"{path}: {error}") from None
    except sqlite3.DatabaseError as error:
        database.close()
        _set_aside(path, f"is damaged ({error})")  # SQLite drops a log that is left beside a new file
        return _open(path)
    if not path.exists() or not os.path.samestat(opened, path.stat()):
        database.close()
        raise BlockingIOError(f"{path} was removed while it was opened")
    return database


def _files(path: Path) -> list[Path]:
    """A database and what SQLite keeps beside it."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-journal", "-shm")]


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.set-aside-{time.time_ns()}")
    path.rename(aside)
    logger.warning("%s %s: it is set aside as %s", path, why, aside.name)
