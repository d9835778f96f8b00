"""How the process of a run's owner ends: with which exit code, and by "Stop run" on the run's page."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import traceback
from typing import Any

from . import wandb_internals
from .ledger import line

logger = logging.getLogger("wandb_run")

STOP = "stop"  # a file in the private folder, when somebody has pressed "Stop run"
INTERRUPTED = 255  # the exit code that wandb records for Ctrl-C, and so for "Stop run"


class Unfinished:
    """Runs of this driver that are not finished. It finishes them when it ends, each with its own exit code.

    Which that is, it finds out as wandb does: by `sys.exit` and `sys.excepthook`.
    """

    def __init__(self) -> None:
        self._runs: dict[Any, tuple[int, str | None]] = {}  # -> exit code and failure, as things stand
        self._pid = 0  # of the process that has them
        self._hooks: tuple | None = None

    def add(self, run: Any) -> None:
        if self._pid != os.getpid():  # the first time, or in a fork, whose runs they are not
            self._pid, self._runs = os.getpid(), {}
        if self._hooks != (sys.exit, sys.excepthook):  # somebody has put others in their place
            self._watch()
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)  # now, so that it runs before Ray's own, which takes the actors down
        self._runs[run] = 0, None

    def _watch(self) -> None:
        end, tell = sys.exit, sys.excepthook

        def on_exit(code: Any = None) -> None:
            self._end_as(*how_it_ends(SystemExit(code)))
            end(code)

        def on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            code, failure = how_it_ends(error)
            self._end_as(INTERRUPTED if kind is KeyboardInterrupt else code, failure)
            tell(kind, error, trace)

        self._hooks = on_exit, on_exception
        sys.exit, sys.excepthook = self._hooks

    def _end_as(self, exit_code: int, failure: str | None) -> None:
        self._runs.update(dict.fromkeys(self._runs, (exit_code, failure)))

    def remove(self, run: Any) -> None:
        self._runs.pop(run, None)

    def finish(self, exit_code: int | None = None, failure: str | None = None) -> None:
        """Finishes all of them, each as far as it can be, at the same time. exit_code: each run's own if None."""

        def finish_one(run: Any, code: int, why: str | None) -> None:
            try:
                run.finish(code, failure=why)
            except Exception as error:
                logger.warning("run %s could not be finished: %s", run.name, line(error))
                self.remove(run)

        ends = [(run, *(own if exit_code is None else (exit_code, failure))) for run, own in [*self._runs.items()]]
        threads = []
        for end in ends:
            try:
                (thread := threading.Thread(target=finish_one, args=end)).start()
                threads.append(thread)
            except RuntimeError:  # Python 3.12.0 to 3.12.2 begin no thread at their end
                finish_one(*end)
        for thread in threads:
            thread.join()

    def _at_exit(self) -> None:
        if self._pid == os.getpid():  # and no fork of it
            self.finish()


unfinished = Unfinished()


def how_it_ends(error: BaseException | None) -> tuple[int, str | None]:
    """The exit code of a process that an exception ends, and what went wrong: a line, then the rest."""
    code = int(error is not None)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if not code:
        return 0, None
    if not -(2**31) <= code < 2**31:  # W&B has no room for it
        code = 1
    name = type(error).__name__
    failure = name if line(error) == name else f"{name}: {line(error)}"
    if isinstance(error, Exception) and error.__traceback__:
        failure += "\n" + "".join(traceback.format_exception(error))
    return code, failure


def interrupt() -> None:
    """Does to this process what "Stop run" does to one that called `wandb.init` itself: as Ctrl-C."""
    if wandb_internals.agent_is_running():
        return
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # ends a system call, too
