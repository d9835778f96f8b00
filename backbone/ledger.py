"""The account of a pipeline: what its workers said, and how much of it W&B has."""

from __future__ import annotations

import dataclasses
from pathlib import Path


class RunFinishedError(RuntimeError):
    """Something was logged to a run after `finish`."""


def run_is_finished(name: str) -> RunFinishedError:
    return RunFinishedError(f"run {name!r} is finished, so nothing more can be logged to it")


@dataclasses.dataclass
class Ledger:
    """What came in from the workers of a pipeline, and what is there: `reports` = reports in rows + `lost`."""

    name: str
    id: str
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
    rows: int = 0  # that are in a transaction log or on the server
    partial: int = 0  # of the rows: on fewer workers than the pipeline has
    lost: int = 0  # reports that are in no row
    lost_values: int = 0  # values that W&B refused, or that could not be reduced; the rest of their rows is there

    def __str__(self) -> str:
        """For the end of a program: the account, where the run is, and each warning on a line of its own."""
        account = f"{self.name}: {self.rows} rows from {self.reports} reports, {self.lost} lost"
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
