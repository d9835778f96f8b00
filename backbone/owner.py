"""The process that makes a run, its owner: what of it must be known in order to run as if it had called `wandb.init`.

The pipeline actor is another process, maybe started by somebody else's Ray. All that a W&B user expects to count there
comes to it in a letter, a private file on the owner's node. Ray is imported where it is needed, because `recover` does
without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import arguments, exits
from .files import OUTBOXES, Address, is_private, make_runs_folder, this_machine
from .ledger import line

logger = logging.getLogger("wandb_run")

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

    @property
    def key(self) -> bytes:
        from ray.runtime_context import get_runtime_context

        return f"wandb-run {get_runtime_context().get_job_id()} {self.run} {self.sweep}".encode()

    def take(self) -> bool:
        """Whether it could be taken."""
        from ray.experimental import internal_kv

        taken = self in _claimed or internal_kv._internal_kv_put(self.key, b"", overwrite=False)
        _claimed.add(self)
        return not taken

    def give_back(self) -> None:
        """The run could not start."""
        from ray.experimental import internal_kv

        if self.run or self.sweep:
            _claimed.discard(self)
            internal_kv._internal_kv_del(self.key)


def job_environment() -> dict[str, str]:
    """What `ray.init(runtime_env={"env_vars": …})` says, which the driver's own environment has not."""
    from ray.runtime_context import get_runtime_context

    return dict(get_runtime_context().runtime_env.get("env_vars") or {})


def make_private_folder(name: str, node: str) -> Address:
    """Of a new run: the letter and the outboxes are in it."""
    folder = Path(tempfile.mkdtemp(prefix="wandb-run-"))  # with mode 0700
    (folder / OUTBOXES).mkdir(0o700)
    return Address(name, uuid.uuid4().hex, folder, this_machine(), node)


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
    with os.fdopen(os.open(letter.address.folder / "letter", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(content)


def read_letter(folder: Path) -> Letter:
    """Raises OSError where there is none that can be trusted."""
    path = folder / "letter"
    if not is_private(path):
        raise OSError(f"{path} is no private file of this user")
    with path.open("rb") as file:
        return pickle.load(file)


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


# The start


class Owned(NamedTuple):
    """What the process that makes a run has of it."""

    actor: Any  # Ray's handle
    letter: Letter
    stop: Callable[[], None]  # what "Stop run" does
    undo: contextlib.ExitStack  # of the start

    def watch(self) -> None:
        """In a thread: calls `stop` once, when somebody presses "Stop run" on the run's page, and keeps the outbox there.

        Not by a call of the actor that returns then: Ray lets no worker end by itself while it waits for an answer.
        """
        from . import process

        box, file = process.outbox(self.letter.address), exits.stop_file(self.letter.address.folder)

        def watch() -> None:
            stopped = False
            while not box.is_finished and not box.is_closed:
                box.look()
                if not stopped and (stopped := file.exists()):
                    self.stop()
                time.sleep(1)

        threading.Thread(target=watch, daemon=True).start()

    def give_up(self) -> None:
        """The run could not start."""
        self.undo.close()

    def forget(self) -> None:
        """The run is finished."""
        forget(self.letter.address)


def forget(address: Address) -> None:
    """Nothing of a run of this process is needed any more."""
    from . import nodes, process

    nodes.give_back(address.nonce)
    process.forget(address)
    shutil.rmtree(address.folder, ignore_errors=True)


def start_actor(pipeline: Any, init: dict[str, Any]) -> Owned:
    """Starts the pipeline actor on this node, where the run's folder and the login are.

    pipeline: the actor class. init: for `wandb.init`. Raises ValueError, TypeError or OSError for what can't work; then
    nothing is left of it.
    """
    import ray
    from ray.experimental import internal_kv
    from ray.runtime_context import get_runtime_context
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from . import process

    context, init = get_runtime_context(), arguments.said(init)
    with contextlib.ExitStack() as undo:
        environ, claim, aside = travelling(init.get("id"))
        undo.callback(claim.give_back)
        own = dict(id=uuid.uuid4().hex[:8], dir=".", job_type=pipeline.job_type)
        init = arguments.complete(init, own, environ)
        if aside:
            logger.warning("run %s %s", init.get("name") or init["id"], aside)
        stop = init["settings"].pop("stop_fn", None) or exits.interrupt
        address = make_private_folder(init.get("name") or init["id"], context.get_node_id())
        undo.callback(forget, address)
        box = process.outbox(address)
        box.open()
        job = context.get_job_id() if context.worker.mode == ray.WORKER_MODE else ""
        letter = Letter(address, box.process.name, job, init, environ, os.getcwd(), command_line())
        write_letter(letter)
        make_runs_folder(init["dir"])
        internal_kv._internal_kv_put(address.key("open"), b"", namespace=process.KV)
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        options = dict(name=address.actor, namespace=process.NAMESPACE, scheduling_strategy=here)
        actor = pipeline.options(**options).remote(address.folder)
        undo.callback(ray.kill, actor)
        return Owned(actor, letter, stop, undo.pop_all())
