"""What must be known of the process that makes a run, in order to run as if that had called `wandb.init`.

The pipeline actor is another process, maybe started by somebody else's Ray. All that a W&B user expects to count there
comes to it in a letter, a private file on the owner's node. Ray is imported where it is needed, because `recover` does
without.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .files import Address, is_private, write_private
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

    address: Address
    process: str  # the owner's name
    job: str  # the owner's Ray job, if it is a worker of Ray's; empty for a driver
    init: dict[str, Any]  # for `wandb.init`
    environ: dict[str, str]
    directory: str  # where the owner is: wandb's settings and the repository are found from there
    argv: list[str]


_claimed: set[tuple] = set()  # ids in the environment that a run of this process has got


def travelling(own_id: str | None) -> tuple[dict[str, str], Claim, str]:
    """The variables that a run's actor gets, with an id that it has claimed, or a line to say why it has not.

    own_id: the run's id, if the code says so.
    """
    environ = {name: os.path.expandvars(value) for name, value in job_environment().items()} | dict(os.environ)
    environ = {k: v for k, v in environ.items() if k.startswith("WANDB_") or k.upper() in NETWORK}
    environ.pop("WANDB_SERVICE", None)  # of wandb in this process
    run, sweep = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
    claim = Claim(run, sweep)
    if not (run or sweep) or (own_id in (None, run) and claim.take()):
        return environ, claim, ""
    for name in ONE_RUN:
        environ.pop(name, None)
    what = f"the sweep {sweep}" if sweep else f"WANDB_RUN_ID={run}"
    return environ, Claim(None, None), f"stays outside {what}, which is for one run"


class Claim(NamedTuple):
    """Of ids in the environment, which Ray's workers have as well, by one run of a job."""

    run: str | None
    sweep: str | None

    def take(self) -> bool:
        """Whether it could be taken."""
        from . import ray_internals

        taken = self in _claimed or ray_internals.put(self._key(), b"", overwrite=False)
        _claimed.add(self)
        return not taken

    def give_back(self) -> None:
        """The run could not start."""
        from . import ray_internals

        if self.run or self.sweep:
            _claimed.discard(self)
            ray_internals.delete(self._key())

    def _key(self) -> bytes:
        from ray.runtime_context import get_runtime_context

        return f"claim/{get_runtime_context().get_job_id()}/{self.run}/{self.sweep}".encode()


def job_environment() -> dict[str, str]:
    """What `ray.init(runtime_env={"env_vars": …})` says, which the driver's own environment has not."""
    from ray.runtime_context import get_runtime_context

    return dict(get_runtime_context().runtime_env.get("env_vars") or {})


def write_letter(letter: Letter) -> None:
    """Raises TypeError for an argument that can't be sent."""
    from ray import cloudpickle  # a config may have objects of the user's `__main__`

    try:
        content = cloudpickle.dumps(letter)
    except Exception:
        for name, value in letter.init.items():
            try:
                cloudpickle.dumps(value)
            except Exception as error:
                raise TypeError(f"{name}={value!r:.80} can't be sent to the pipeline actor: {line(error)}") from None
        raise
    write_private(letter.address.folder / "letter", content)


def read_letter(folder: Path) -> Letter:
    """Raises OSError where there is none that can be trusted."""
    path = folder / "letter"
    if not is_private(path):
        raise OSError(f"{path} is no private file of this user")
    content = path.read_bytes()
    try:
        return pickle.loads(content)
    except Exception as error:  # an earlier version of this code has written it
        raise OSError(f"{path} can't be read: {line(error)}") from None


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
    from ray.runtime_context import get_runtime_context

    from . import ray_internals

    if ray_internals.in_driver():
        main = sys.modules["__main__"]
        module = getattr(main, "__spec__", None)  # of `python -m`
        return [f"-m {module.name}" if module else getattr(main, "__file__", NO_PROGRAM), *sys.argv[1:]]
    words = ray_internals.command(get_runtime_context().get_job_id()).split()
    words = words[1:] if words[:1] == [sys.executable] else words
    if words[:1] == ["-m"]:
        return [" ".join(words[:2]), *words[2:]]
    return [NO_PROGRAM] if words[:1] in ([], ["-c"]) else words
