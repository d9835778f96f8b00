"""What workers say besides metrics: alerts, config, summary and log lines. It goes the way that reports go."""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .ledger import RunFinishedError, line
from .state import State
from .values import encodable

if TYPE_CHECKING:
    import wandb


def _add_used(run: wandb.Run, names: list[str]) -> None:
    """Adds to the artifacts that the run's config says it has used."""
    used = dict.fromkeys([*run.config.get("used_artifacts", ()), *names])
    run.config.update({"used_artifacts": [*used]}, allow_val_change=True)


# What W&B is told, by its kind.
TELL: dict[str, Callable[[wandb.Run, Any], object]] = {
    "config": lambda run, value: run.config.update(value, allow_val_change=True),
    "summary": lambda run, value: run.summary.update(value),
    "used_artifacts": _add_used,
    "alert": lambda run, value: run.alert(**value),
    "log_lines": lambda run, value: run.write_logs(value),
}
KNOWN = {"config": {}, "summary": {}, "used_artifacts": []}  # what is told again after a restart


def alert(title: str, text: str, level: Any, wait_duration: Any) -> dict[str, Any]:
    """What a worker says for an alert. Raises ValueError or TypeError for what can't be."""
    level = getattr(level, "value", level)
    if level not in ("INFO", "WARN", "ERROR"):
        raise ValueError(f"level must be INFO, WARN or ERROR, not {level!r}")
    if not isinstance(wait_duration, int | float | timedelta):
        raise TypeError(f"wait_duration must be seconds or a timedelta, not {wait_duration!r}")
    seconds = wait_duration.total_seconds() if isinstance(wait_duration, timedelta) else float(wait_duration)
    if not 0 <= seconds < 2**31:
        raise ValueError(f"wait_duration must be some seconds, not {wait_duration!r}")
    return dict(title=encodable(str(title)), text=encodable(str(text)), level=level, wait_duration=seconds)


class Said:
    """In the pipeline actor: what is to be told to W&B. It is in the state until that is done, except for log lines."""

    def __init__(self, state: State):
        self._state = state
        self._lines: list[str] = []

    def take(self, who: str, wall_time: float, content: bytes) -> None:
        """Takes what a worker has said: a kind and its value."""
        try:
            kind, value = pickle.loads(content)
        except Exception as error:  # a class of the user's that this process can't import
            return self._state.unheard(f"{who}: {line(error)}")
        facts = self._state.facts
        if kind == "log_line":
            self._lines.append(f"{who}: {value}")
        elif kind in ("log_artifact", "use_artifact"):
            self._state.do("INSERT INTO artifacts (task) VALUES (?)", content)
            if kind == "use_artifact" and value["name"] not in (used := facts.get("used_artifacts", [])):
                self._state.note(used_artifacts=[*used, value["name"]])
                self._tell("used_artifacts", [value["name"]])
        elif kind == "alert":
            if not self._is_repeated(value, wall_time):
                self._tell(kind, value)
        elif kind in ("config", "summary"):
            self._state.note(**{kind: facts.get(kind, {}) | value})
            self._tell(kind, value)

    def _tell(self, kind: str, value: Any) -> None:
        self._state.note(said=[*self._state.facts.get("said", ()), (kind, value)])

    def _is_repeated(self, alert: dict[str, Any], wall_time: float) -> bool:
        """Whether one of this title has gone out: all ranks may send it, in one process or many."""
        told = self._state.facts.get("alerted", {})
        if abs(wall_time - told.get(alert["title"], -math.inf)) < alert["wait_duration"]:  # clocks differ, and leap
            return True
        self._state.note(alerted=told | {alert["title"]: wall_time})
        return False

    def take_news(self) -> list[tuple[str, Any]]:
        """What W&B is to be told, kinds and values. On the disk it stays until the next commit."""
        lines, self._lines = self._lines, []
        if news := self._state.facts.get("said", []):
            self._state.note(said=[])
        return [*news, ("log_lines", "\n".join(lines))] if lines else news

    def forget(self, keys: Collection[str]) -> None:
        """A row has these keys: what was told before of the summary of one is not to be told again."""
        known = self._state.facts.get("summary", {})
        if not known.keys().isdisjoint(keys):
            waiting = {key for kind, value in self._state.facts.get("said", ()) if kind == "summary" for key in value}
            kept = {key: value for key, value in known.items() if key in waiting or key not in keys}
            self._state.note(summary=kept)

    def again(self) -> None:
        """What is known is to be told again, to a run that goes on in a new folder."""
        facts = self._state.facts
        known = [(kind, facts[kind]) for kind in KNOWN if facts.get(kind)]
        self._state.note(said=[*known, *facts.get("said", ())])


class LogHandler(logging.Handler):
    """In a worker: brings log lines to the run's Logs.

    say: called with each. It takes 1,000 lines a minute, and says how many it has left out.
    """

    LIMIT, LONGEST = 1000, 10_000  # lines, characters

    def __init__(self, say: Callable[[Any], None]):
        super().__init__()
        self._say, self._minute, self._lines = say, 0.0, 0
        # Our own lines are in the run by themselves. A filter comes before the handler's lock: another thread may wait
        # for that in the middle of `log`.
        self.addFilter(lambda record: record.name != "wandb_run")

    def emit(self, record: logging.LogRecord) -> None:
        now, left_out = time.monotonic(), 0
        if now > self._minute + 60:
            left_out, self._minute, self._lines = self._lines - self.LIMIT, now, 0
        self._lines += 1
        try:
            if left_out > 0:
                self._tell(f"… {left_out} more lines")
            if self._lines <= self.LIMIT:
                self._tell(self.format(record)[: self.LONGEST])
        except Exception:
            self.handleError(record)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(RunFinishedError):  # the line goes wherever else lines go
            self._say(text)
