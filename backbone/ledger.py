"""The account of a pipeline: what its workers said, and how much of it W&B has.

    python -m backbone.ledger FOLDER …

counts finished runs anew from what is in their folders, and ends with status 1 if something is missing. It takes no
account, so a CI job can check its runs with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .transaction_log import TransactionLogs

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .state import State
    from .writer import Writer

FILE = "ledger.json"  # in a run's folder


class RunFinishedError(RuntimeError):
    """Something was logged to a run after `finish`."""


def run_is_finished(name: str) -> RunFinishedError:
    return RunFinishedError(f"run {name!r} is finished, so nothing more can be logged to it")


@dataclasses.dataclass
class Ledger:
    """What came in from the workers of a pipeline, and what is there: `reports` = reports in rows + `lost`."""

    name: str = ""
    id: str = ""
    mode: str = ""  # online, offline or disabled
    url: str | None = None
    paths: list[Path] = dataclasses.field(default_factory=list)  # the run's folders: one, and one more per restart
    restarts: int = 0  # of the pipeline actor, after it died
    uploaded: bool = False  # online: the server has it all
    lost_artifacts: int = 0
    unheard: list[str] = dataclasses.field(default_factory=list)  # places that may hold reports which nobody could read
    warnings: list[str] = dataclasses.field(default_factory=list)

    prefix: str = ""
    reports: int = 0  # calls of `log`
    rows: int = 0  # that are in a transaction log or on the server; as long as the run goes on, that were made
    partial: int = 0  # of the rows: on fewer workers than the pipeline has
    lost: int = 0  # reports that are in no row
    lost_values: int = 0  # that could not be reduced, or that W&B refused, config and the like too; the rest is there

    def __str__(self) -> str:
        """For the end of a program: the account, where the run is, and each warning on a line of its own."""
        name = f"{self.name} {self.prefix}".rstrip()
        account = f"{name}: {self.rows} rows from {self.reports} reports, {self.lost} lost"
        return "\n  ".join([account, str(self.url or self.path or "disabled: nothing is kept"), *self.warnings])

    @property
    def path(self) -> Path | None:
        """The run's folder, the latest if it was restarted; None for a disabled run."""
        return self.paths[-1] if self.paths else None

    @property
    def ok(self) -> bool:
        """Whether all that was logged is where it should be, and every process could be heard."""
        missing = self.lost or self.lost_values or self.lost_artifacts or self.unheard
        return not missing and (self.uploaded or self.mode != "online")


Ledgers = dict[str, Ledger]  # by prefix


def line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


def account(state: State, pipeline: Pipeline, has: Callable[[int], bool] | None = None) -> Ledger:
    """A pipeline's ledger: so far, or at the end. has: says then of a row's number whether W&B has that row."""
    facts = state.facts
    known = ("name", "id", "mode", "url", "restarts", "uploaded", "lost_artifacts", "unheard")
    ledger = Ledger(**{field: facts[field] for field in known if field in facts})
    ledger.paths = [*map(Path, facts.get("paths", ()))]
    ledger.prefix, ledger.warnings = pipeline.prefix, state.warnings
    for field in ("reports", "rows", "partial", "lost_values"):
        setattr(ledger, field, pipeline.counts[field])
    if has:
        ledger.rows, ledger.lost = 0, ledger.reports
        ledger.lost_values += facts.get("refused", 0)
        for number, reports, refused in rows_of(state, pipeline):
            if has(number):
                ledger.rows, ledger.lost = ledger.rows + 1, ledger.lost - reports
                ledger.lost_values += refused
    return ledger


def rows_of(state: State, pipeline: Pipeline) -> Iterator[tuple[int, int, int]]:
    """A pipeline's rows: number, reports that it stands on, values that W&B has refused. There may be millions."""
    return state.db.execute("SELECT number, reports, refused FROM rows WHERE pipeline = ?", (pipeline.number,))


def summary(state: State, pipelines: Sequence[Pipeline]) -> dict[str, int]:
    """What the run's summary says of it, before W&B has written the last rows."""
    reports = sum(pipeline.counts["reports"] for pipeline in pipelines)
    [(in_rows,)] = state.db.execute("SELECT coalesce(sum(reports), 0) FROM rows")
    return {"reports": reports, "lost": reports - in_rows}


def conclude(state: State, writer: Writer, pipelines: Sequence[Pipeline]) -> None:
    """Makes the ledgers of a finished run. They stay in its state until they have arrived, and in its folder."""
    # Read anew, and not on: what was seen may have been removed or damaged since.
    writer.logs = TransactionLogs(state.facts.get("paths", ()))
    ledgers = {pipeline.prefix: account(state, pipeline, writer.has) for pipeline in pipelines}
    if lost := sum(ledger.lost for ledger in ledgers.values()):
        state.warn("lost", f"{lost} reports are in no row")
    for ledger in ledgers.values():
        ledger.warnings = state.warnings
    state.note(ledgers=ledgers)
    with contextlib.suppress(OSError, sqlite3.Error):
        state.commit()
        content = {}
        for pipeline in pipelines:
            row_reports = {number: reports for number, reports, _ in rows_of(state, pipeline)}
            more = {"row_reports": row_reports, "first": state.facts.get("first", 0)}
            more |= {"totals": pipeline.totals, "best": pipeline.best}  # for the next life
            content[pipeline.prefix] = dataclasses.asdict(ledgers[pipeline.prefix]) | more
        if paths := state.facts.get("paths"):
            written = Path(paths[-1], f"{FILE}.tmp")
            written.write_text(json.dumps(content, default=str))
            written.rename(Path(paths[-1], FILE))


def kept(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Path]]:
    """What the ledgers in a run's folders, oldest first, say of each pipeline at last, by prefix.

    And the folders of which no ledger knows.
    """
    found, known = {}, set()
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            ledgers = json.loads((folder / FILE).read_text())
            known.update(Path(path).name for each in ledgers.values() for path in each["paths"])
            found |= ledgers
    return found, [folder for folder in folders if folder.name not in known]


def count(folder: Path) -> Ledgers:
    """The ledgers of a finished run, with the rows that are in its folders now. The folders may have moved together.

    Raises OSError where there is no ledger, and ValueError where it can't be read.
    """
    content: dict[str, dict[str, Any]] = json.loads((folder / FILE).read_text())
    ledgers = {}
    for prefix, each in content.items():
        row_reports = {int(number): reports for number, reports in each["row_reports"].items()}
        ledger = Ledger(**{field.name: each[field.name] for field in dataclasses.fields(Ledger)})
        ledger.paths = [folder.parent / Path(path).name for path in ledger.paths]
        ledgers[prefix] = ledger
        if ledger.mode == "online" and ledger.uploaded:
            continue  # what the server had before a restart need not be here
        logged = TransactionLogs(path for path in ledger.paths if path.exists()).numbers
        found = [reports for number, reports in row_reports.items() if number in logged]
        ledger.rows, ledger.lost = len(found), ledger.reports - sum(found)
    return ledgers


def main(folders: list[str]) -> int:
    if not folders:
        sys.exit(__doc__)
    status = 0
    for folder in folders:
        try:
            ledgers = count(Path(folder).resolve())
        except (OSError, ValueError) as error:
            status = 1
            print(f"{folder} is no folder of a finished run: {line(error)}", file=sys.stderr)
            continue
        for ledger in ledgers.values():
            print(ledger)
            status |= not ledger.ok
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
