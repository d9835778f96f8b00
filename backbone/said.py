"""What workers say besides metrics: alerts, config, summary and log lines. It goes the way that reports go."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from .ledger import RunFinishedError, line
from .state import State

if TYPE_CHECKING:
    import wandb


class Said:
    """In the pipeline actor: what is to be told to W&B. It is in the state until that is done."""

    MINUTE: ClassVar = 60.0  # in which an alert of a title goes out once

    def __init__(self, state: State):
        self._state = state
        self._lines: list[str] = []

    def take(self, who: str, wall_time: float, content: bytes) -> None:
        """Takes what a worker has said: a kind and its value."""
        facts = self._state.facts
        try:
            kind, value = pickle.loads(content)
        except Exception as error:  # a class of the user's that this process can't import
            return self._state.warn("unreadable", f"the pipeline actor can't read what {who} says: {line(error)}")
        if kind == "line":
            self._lines.append(f"{who}: {value}")
        elif kind == "alert":
            title, told = value["title"], facts.get("alerted", {})
            if wall_time - told.get(title, 0.0) >= self.MINUTE:
                self._state.note(alerted=told | {title: wall_time}, alerts=[*facts.get("alerts", ()), value])
        else:  # config or summary
            new, known = f"new_{kind}", facts.get(kind, {})
            self._state.note(**{kind: known | value, new: facts.get(new, {}) | value})

    def news(self) -> list[tuple[str, Callable[[wandb.Run], object]]]:
        """What W&B is to be told: what it is, and how."""
        facts = self._state.facts
        news: list[tuple[str, Callable[[wandb.Run], object]]] = []
        if config := facts.get("new_config"):
            news.append(("a config", lambda run: run.config.update(config, allow_val_change=True)))
        if summary := facts.get("new_summary"):
            news.append(("a summary", lambda run: run.summary.update(summary)))
        for alert in facts.get("alerts", ()):
            news.append((f"the alert {alert['title']!r}", lambda run, alert=alert: run.alert(**alert)))
        if lines := "\n".join(self._lines):
            news.append(("log lines", lambda run: run.write_logs(lines)))
        return news

    def is_told(self) -> None:
        """All news."""
        self._lines.clear()
        for name, nothing in (("new_config", {}), ("new_summary", {}), ("alerts", [])):
            if self._state.facts.get(name):
                self._state.note(**{name: nothing})

    def again(self) -> None:
        """All is to be told again, to a run that goes on in a new folder."""
        for name in ("config", "summary"):
            if known := self._state.facts.get(name):
                self._state.note(**{f"new_{name}": known})


class LogHandler(logging.Handler):
    """In a worker: brings log lines to the run's Logs.

    say: called with each. It takes 1,000 lines a minute, and says how many it has left out.
    """

    LIMIT, LONGEST = 1000, 10_000  # lines, characters

    def __init__(self, say: Callable[[Any], None]):
        super().__init__()
        self._say, self._minute, self._lines = say, 0.0, 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "wandb_run":  # ours; the run has it by itself
            return
        now = time.monotonic()
        if now > self._minute + 60:
            if self._lines > self.LIMIT:
                self._tell(f"… {self._lines - self.LIMIT} more lines")
            self._minute, self._lines = now, 0
        self._lines += 1
        if self._lines <= self.LIMIT:
            try:
                self._tell(self.format(record)[: self.LONGEST])
            except Exception:
                self.handleError(record)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(RunFinishedError):  # the line goes wherever else lines go
            self._say(text)
