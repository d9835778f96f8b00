"""What a run must know of the process that it belongs to, its owner: environment, command line, life, exit code.

The pipeline actor is another process, maybe started by somebody else's Ray. All that a W&B user expects to count there
comes to it in a letter, a private file on the owner's node, which the owner keeps locked for as long as it lives.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import fcntl, is_private
from .ledger import line

logger = logging.getLogger("wandb_run")

# What wandb needs to reach its server, and to find a login.
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
NETWORK += ("CURL_CA_BUNDLE", "NETRC", "HOME")
# What belongs to one run: the first that is made without an id of its own since the value appeared.
ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


@dataclasses.dataclass
class Letter:
    """What the pipeline actor is told. Not by its constructor's arguments, which Ray's GCS keeps and shows."""

    init: dict[str, Any]  # for `wandb.init`
    environ: dict[str, str]
    directory: str  # where the owner is: wandb's settings and the repository are found from there
    argv: list[str]
    ray_worker: str | None  # id of the owner if it is a worker of Ray's, None for a driver


_locked: dict[Path, Any] = {}  # letters of this process; closing a file would end its lock
_taken: set[tuple] = set()  # values of ONE_RUN that a run has got


def travelling(own_id: bool) -> tuple[dict[str, str], str | None]:
    """The variables that a run's actor gets, and a line to say where an id in them is not for this run.

    own_id: the code says what this run's id is.
    """
    environ = {k: v for k, v in os.environ.items() if k.startswith("WANDB_") or k.upper() in NETWORK}
    environ.pop("WANDB_SERVICE", None)  # of wandb in this process
    value = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
    if not any(value):
        return environ, None
    if not own_id and value not in _taken:
        _taken.add(value)
        return environ, None
    for name in ONE_RUN:
        environ.pop(name, None)
    return environ, f"stays outside {'the sweep' if value[1] else f'WANDB_RUN_ID={value[0]}'}, which is for one run"


def write_letter(letter: Letter) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="wandb-run-")  # with mode 0600
    file = _locked[Path(name)] = os.fdopen(descriptor, "r+b")
    pickle.dump(letter, file)
    file.flush()
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX)
    return Path(name)


def read_letter(path: Path) -> Letter:
    if not is_private(path):
        raise OSError(f"{path} is no private file of this user")
    with path.open("rb") as file:
        return pickle.load(file)


def forget_letter(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path in _locked:
        _locked.pop(path).close()


def move_in(letter: Letter) -> None:
    """Makes this process look to wandb as its owner does."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.upper() in NETWORK]:
        del os.environ[name]
    os.environ.update(letter.environ)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it takes a third of the time of `run.log`
    os.environ.setdefault("WANDB_PROGRAM", os.path.abspath(letter.argv[0]) if letter.argv else "")
    sys.argv = letter.argv  # wandb records it; that of a Ray worker is Ray's own, addresses and all
    if os.path.isdir(letter.directory):
        os.chdir(letter.directory)


def has_died(path: Path) -> bool:
    """Waits until the owner is gone; whether that came before it had what it wanted to know."""
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
    return path.exists()


def how_it_ended(ray_worker: str) -> int:
    """The exit code that an ended worker of Ray's deserves, as Ray's GCS tells it."""
    from ray._private.state import state
    from ray.core.generated import common_pb2, gcs_pb2

    for raw in state._connect_and_get_accessor().get_worker_table():
        data = gcs_pb2.WorkerTableData.FromString(raw)
        if data.worker_address.worker_id.hex() == ray_worker:
            intended = common_pb2.INTENDED_SYSTEM_EXIT, common_pb2.INTENDED_USER_EXIT
            return int(data.exit_type not in intended)
    return 1


def command_line() -> list[str]:
    """That of this process; in a worker of Ray's that of its job's driver, or none."""
    import ray
    from ray._private import state

    if ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return sys.argv
    job = ray.get_runtime_context().get_job_id()
    entry = next((found.get("Entrypoint", "") for found in state.jobs() if found["JobID"] == job), "")
    return entry.split()[1:] if entry.split()[:1] == [sys.executable] else entry.split()


class Unfinished:
    """Runs of this driver that are not finished. It finishes them when it ends, with its own exit code.

    Which that is, it finds out as wandb does: by `sys.exit` and `sys.excepthook`, as long as there are such runs.
    """

    def __init__(self) -> None:
        self._runs: list[Any] = []
        self._pid, self._code, self._failure = 0, 0, None

    def add(self, run: Any) -> None:
        if not self._runs:
            self._pid, self._code, self._failure = os.getpid(), 0, None
            self._exit, self._excepthook = sys.exit, sys.excepthook
            sys.exit, sys.excepthook = self._on_exit, self._on_exception
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)  # now, so that it runs before Ray's own, which takes the actors down
        self._runs.append(run)

    def remove(self, run: Any) -> None:
        if run in self._runs:
            self._runs.remove(run)
            if not self._runs:
                sys.exit = self._exit if sys.exit == self._on_exit else sys.exit
                sys.excepthook = self._excepthook if sys.excepthook == self._on_exception else sys.excepthook

    def finish(self, exit_code: int, failure: str | None = None) -> None:
        """Finishes all of them, each as far as it can be, at the same time."""

        def finish(run: Any) -> None:
            try:
                run.finish(exit_code, failure=failure)
            except Exception as error:
                logger.warning("run %s could not be finished: %s", run.name, line(error))
                self.remove(run)

        threads = [threading.Thread(target=finish, args=[run]) for run in self._runs if not run.shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _at_exit(self) -> None:
        if self._pid == os.getpid():  # and no fork of it
            self.finish(self._code, self._failure)

    def _on_exit(self, code: Any = None) -> None:
        self._code = exit_code(SystemExit(code))
        self._exit(code)

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        self._code, self._failure = 255 if kind is KeyboardInterrupt else 1, f"{kind.__name__}: {line(error)}"
        self._excepthook(kind, error, trace)


unfinished = Unfinished()


def exit_code(error: BaseException | None) -> int:
    """That of a process which an exception ends."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def complete(init: Mapping[str, Any], own: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What goes to `wandb.init`, with an absolute `dir`. `own`: what holds unless `init` or the environment say else.

    Raises ValueError for what can't work.
    """
    init = {key: value for key, value in init.items() if value is not None}
    settings = init.get("settings") or {}
    if not isinstance(settings, Mapping):  # wandb.Settings
        settings = {key: getattr(settings, key) for key in settings.model_fields_set}

    def given(name: str) -> Any:
        return init.get(name) or settings.get(name) or environ.get(f"WANDB_{name.upper()}")

    if given("sync_tensorboard") or given("mode") == "shared":
        raise ValueError("sync_tensorboard and mode='shared' make wandb ignore the numbers of rows: use neither here")
    if name := next((name for name in ("resume_from", "fork_from") if given(name)), None):
        raise ValueError(f"{name} counts in W&B's own steps, which are rows here: use id= and resume='allow'")
    variables = {"id": "WANDB_RUN_ID", "dir": "WANDB_DIR", "job_type": "WANDB_JOB_TYPE"}
    unsaid = {key: environ.get(variables[key]) or value for key, value in own.items() if key not in init}
    folder = os.path.abspath(os.path.expanduser((init | unsaid)["dir"]))
    return init | unsaid | dict(dir=folder, settings=dict(settings))
