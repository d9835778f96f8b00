"""What a run must know of the process that it belongs to, its owner: arguments, environment, command line, life.

The pipeline actor is another process, maybe started by somebody else's Ray. All that a W&B user expects to count there
comes to it in a letter, a private file on the owner's node, which the owner keeps locked for as long as it lives.
Ray is imported where it is needed, because `ending` does without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import fcntl, is_private
from .ledger import line

# What wandb needs to reach its server, and to find a login.
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
NETWORK += ("CURL_CA_BUNDLE", "NETRC", "HOME")
NO_PROGRAM = "<python with no main file>"  # as wandb says
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
    ended: tuple[int, str | None] | None = None  # exit code and failure, from an owner that can't call the actor


_locked: dict[Path, Any] = {}  # letters of this process; closing a file would end its lock
_taken: set[tuple] = set()  # ids in the environment that a run of this process has got


def travelling(own_id: str | None) -> tuple[dict[str, str], str | None]:
    """The variables that a run's actor gets, and a line to say where an id in them is not for this run.

    own_id: the run's id, if the code says so.
    """
    environ = {k: v for k, v in os.environ.items() if k.startswith("WANDB_") or k.upper() in NETWORK}
    environ.pop("WANDB_SERVICE", None)  # of wandb in this process
    run, sweep = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
    if not (run or sweep) or (own_id in (None, run) and not _is_taken(run, sweep)):
        return environ, None
    for name in ONE_RUN:
        environ.pop(name, None)
    return environ, f"stays outside {f'the sweep {sweep}' if sweep else f'WANDB_RUN_ID={run}'}, which is for one run"


def _is_taken(*ids: str | None) -> bool:
    """Whether another run of this job has got the ids in the environment, which Ray's workers have as well."""
    from ray.experimental import internal_kv
    from ray.runtime_context import get_runtime_context

    key = f"wandb-run {get_runtime_context().get_job_id()} {ids}"
    taken = ids in _taken or internal_kv._internal_kv_put(key.encode(), b"", overwrite=False)
    _taken.add(ids)
    return taken


def write_letter(letter: Letter) -> Path:
    """Raises TypeError for an argument that can't be sent, before there is a file."""
    content = _pickled(letter)
    descriptor, name = tempfile.mkstemp(prefix="wandb-run-")  # with mode 0600
    file = _locked[Path(name)] = os.fdopen(descriptor, "r+b")
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX)
    file.write(content)
    file.flush()
    return Path(name)


def rewrite_letter(path: Path, letter: Letter) -> None:
    file, content = _locked[path], _pickled(letter)
    file.seek(0)
    file.truncate()
    file.write(content)
    file.flush()


def _pickled(letter: Letter) -> bytes:
    from ray import cloudpickle  # a config may have objects of the user's `__main__`

    try:
        return cloudpickle.dumps(letter)
    except Exception:
        for name, value in letter.init.items():
            try:
                cloudpickle.dumps(value)
            except Exception as error:
                raise TypeError(f"{name}={value!r:.80} can't be sent to the pipeline actor: {line(error)}") from None
        raise


def read_letter(path: Path) -> Letter:
    if not is_private(path):
        raise OSError(f"{path} is no private file of this user")
    with path.open("rb") as file:
        return pickle.load(file)


def keep_letter(path: Path) -> None:
    """Makes it new: some systems clean their temporary folder of what is old."""
    with contextlib.suppress(OSError):
        os.utime(path)


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
    os.environ.setdefault("WANDB_PROGRAM", letter.argv[0])
    sys.argv = letter.argv  # wandb records it; that of a Ray worker is Ray's own, addresses and all
    if os.path.isdir(letter.directory):
        os.chdir(letter.directory)


def command_line() -> list[str]:
    """Program and arguments of this process; in a worker of Ray's those of its job's driver."""
    import ray
    from ray._private import state
    from ray.runtime_context import get_runtime_context

    if get_runtime_context().worker.mode != ray.WORKER_MODE:
        main = sys.modules["__main__"]
        module = getattr(main, "__spec__", None)  # of `python -m`
        return [f"-m {module.name}" if module else getattr(main, "__file__", NO_PROGRAM), *sys.argv[1:]]
    job = get_runtime_context().get_job_id()
    words = next((found.get("Entrypoint", "") for found in state.jobs() if found["JobID"] == job), "").split()
    words = words[1:] if words[:1] == [sys.executable] else words
    if words[:1] == ["-m"]:
        return [" ".join(words[:2]), *words[2:]]
    return [NO_PROGRAM] if words[:1] in ([], ["-c"]) else words


def arguments(init: Mapping[str, Any]) -> dict[str, Any]:
    """What the code says to `wandb.init`; settings are a dict, without those that are arguments as well."""
    init = {key: value for key, value in init.items() if value is not None}
    settings = init.get("settings") or {}
    if not isinstance(settings, Mapping):  # wandb.Settings
        settings = {key: getattr(settings, key) for key in settings.model_fields_set}
    settings = {key: value for key, value in settings.items() if value is not None}
    same = {"run_id": "id", "root_dir": "dir", "run_job_type": "job_type"}
    return {same[key]: settings.pop(key) for key in same if key in settings} | init | dict(settings=settings)


def complete(init: Mapping[str, Any], own: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What goes to `wandb.init`, with an absolute `dir`. `own`: what holds unless `init` or the environment say else.

    Raises ValueError for what can't work.
    """
    variables = {name.removeprefix("WANDB_").lower(): value for name, value in environ.items()}
    said = dict(id=variables.get("run_id"), dir=variables.get("dir"), job_type=variables.get("job_type"))
    said = {key: value for key, value in said.items() if value}

    def given(name: str) -> Any:
        found = next((place[name] for place in (init, init["settings"], variables) if name in place), None)
        return None if str(found).lower() in ("false", "0", "") else found

    if given("sync_tensorboard") or given("mode") == "shared":
        raise ValueError("sync_tensorboard and mode='shared' make wandb ignore the numbers of rows: use neither here")
    if name := next((name for name in ("resume_from", "fork_from") if given(name)), None):
        raise ValueError(f"{name} counts in W&B's own steps, which are rows here: use id= and resume='allow'")
    if given("resume") in (True, "auto") and "id" not in said | init:
        raise ValueError(
            "resume='auto' goes on with the last run of a folder, whichever it was: use id= and resume='allow'"
        )
    init = own | said | init
    return init | dict(dir=os.path.abspath(os.path.expanduser(init["dir"])))
