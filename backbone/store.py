"""Everything that must survive the pipeline actor: an SQLite file of the run, in which a push is one transaction.

Nothing is synced to the disk: what is with the kernel outlives the process. Knows nothing of Ray and wandb, so whoever
finds the file of a dead actor can go on from it.
"""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from . import values
from .files import open_database, remove_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS pipelines (prefix TEXT PRIMARY KEY, reduction BLOB, state BLOB);
CREATE TABLE IF NOT EXISTS senders (id TEXT PRIMARY KEY, prefix TEXT, state BLOB);
CREATE TABLE IF NOT EXISTS early (sender TEXT, serial INTEGER, batch BLOB, PRIMARY KEY (sender, serial));
CREATE TABLE IF NOT EXISTS workers (
    prefix TEXT, worker TEXT, step INTEGER, committed INTEGER, heard REAL, dead INTEGER, PRIMARY KEY (prefix, worker));
CREATE TABLE IF NOT EXISTS reports (
    prefix TEXT, id INTEGER, step INTEGER, worker TEXT, heard REAL, metrics BLOB, PRIMARY KEY (prefix, id));
CREATE INDEX IF NOT EXISTS reports_of_a_step ON reports (prefix, step);
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, prefix TEXT, reports INTEGER, metrics BLOB, refused INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS artifacts (id INTEGER PRIMARY KEY, task BLOB, client TEXT, done INTEGER DEFAULT 0);
"""


class Row(NamedTuple):
    """A row of the run, with the number that W&B knows it by (`_step`)."""

    number: int
    metrics: dict[str, Any]


class Store:
    """A run's facts, warnings and rows, and the tables of its pipelines and artifacts.

    Raises OSError where another process has the store, and keeps it for `PATIENCE` seconds.
    """

    PATIENCE: ClassVar = 10.0

    def __init__(self, path: Path):
        self.path, self.db = path, open_database(path, self.PATIENCE)
        self.db.executescript(SCHEMA)
        facts = self.db.execute("SELECT * FROM facts").fetchall()
        self.facts: dict[str, Any] = {name: pickle.loads(value) for name, value in facts}
        self._unsaved: dict[str, Any] = {}
        self.hear: Callable[[str], None] = lambda warning: None  # is told the first warning of a kind

    def note(self, **facts: Any) -> None:
        """Remembers facts of the run by name."""
        self.facts |= facts
        self._unsaved |= facts
        if not self.db.in_transaction:  # else they are saved behind it, whatever becomes of it
            self._save()

    def _save(self) -> None:
        rows = [(name, pickle.dumps(value)) for name, value in self._unsaved.items()]
        with contextlib.suppress(sqlite3.Error):  # the disk is full: this process remembers them, and tries again
            self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)
            self._unsaved.clear()

    def warn(self, kind: str, what: str) -> None:
        """Counts a warning; only the first one of a kind is told."""
        known = self.facts.get("warnings", {})
        first, count = known.get(kind, (what, 0))
        self.note(warnings=known | {kind: (first, count + 1)})
        if not count:
            self.hear(what)

    @property
    def warnings(self) -> list[str]:
        found = self.facts.get("warnings", {}).values()
        return [what if count == 1 else f"{what} ({count} times)" for what, count in found]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written in here is there afterwards, or nothing of it."""
        self.db.execute("BEGIN")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have done it itself
                self.db.execute("ROLLBACK")
            raise
        finally:
            if self._unsaved:
                self._save()

    # Rows

    def add_row(self, prefix: str, reports: int, metrics: dict[str, Any]) -> Row:
        """Gives a row the next number. `reports`: how many it stands on."""
        number = self._next_number()
        row = (number, prefix, reports, values.pack(metrics))
        self.db.execute("INSERT INTO rows (number, prefix, reports, metrics) VALUES (?, ?, ?, ?)", row)
        return Row(number, metrics)

    def _next_number(self) -> int:
        (last,) = self.db.execute("SELECT max(number) FROM rows").fetchone()
        return max(self.facts.get("first", 0), 0 if last is None else last + 1)

    def missing(self, there: Callable[[int], bool], highest: int) -> Iterator[Row]:
        """The rows that are not `there`, in order. Those below the `highest` that is get numbers behind all others.

        W&B drops a number that is lower than the last one.
        """
        numbers = [number for (number,) in self.db.execute("SELECT number FROM rows")]
        lacking = [(number < highest, number) for number in numbers if not there(number)]
        for _, number in sorted(lacking):
            new = self._next_number() if number < highest else number
            self.db.execute("UPDATE rows SET number = ? WHERE number = ?", (new, number))
            (metrics,) = self.db.execute("SELECT metrics FROM rows WHERE number = ?", (new,)).fetchone()
            yield Row(new, values.unpack(metrics))

    def refuse(self, number: int, values: int) -> bool:
        """Notes how many values of a row W&B has refused; whether that is new, and not known from before a restart."""
        update = "UPDATE rows SET refused = ? WHERE number = ? AND refused = 0"
        with contextlib.suppress(sqlite3.Error):
            return self.db.execute(update, (values, number)).rowcount > 0
        return True

    def account(self, prefix: str, there: Callable[[int], bool]) -> Counter[str]:
        """What of a pipeline's rows is there: `rows`, the `reports` in them and the values they lack."""
        counts: Counter[str] = Counter()
        rows = self.db.execute("SELECT number, reports, refused FROM rows WHERE prefix = ?", (prefix,))
        for number, reports, refused in rows:
            if there(number):
                counts.update(rows=1, reports=reports, lost_values=refused)
        return counts

    # The file

    def close(self) -> None:
        self.db.close()

    def remove(self) -> None:
        self.close()
        remove_database(self.path)
