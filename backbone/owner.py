"""The process that makes a run, its owner: starts the pipeline actor, and knows when "Stop run" is pressed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.runtime_context import get_runtime_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import arguments, exits, process, ray_internals, recover
from .actor import NAMESPACE, ActorGoneError, call
from .files import (
    LEDGERS,
    NETWORK,
    Address,
    Letter,
    make_runs_folder,
    this_machine,
    this_view,
    write_letter,
    write_private,
)
from .ledger import Ledger, Ledgers, line
from .reduction import Reduction
from .run import Started
from .takeover import PLACES

logger = logging.getLogger("wandb_run")
NO_PROGRAM = "<python with no main file>"  # as wandb says
# What belongs to one run: the first that is made without an id of its own since the value appeared.
ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


@dataclasses.dataclass
class Owned:
    """What the process that makes a run has of it, and of its views."""

    actor: Any  # Ray's handle
    letter: Letter
    stop: Callable[[], None]  # what "Stop run" does
    undo: contextlib.ExitStack  # of the start
    pid: int = dataclasses.field(default_factory=os.getpid)
    prefixes: list[str] = dataclasses.field(default_factory=list)  # of the pipelines that have joined

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline to the run, which the first one starts. Raises what the start raises, in one line."""
        ask = functools.partial(call, self.letter.address, self.actor)
        try:
            started = ask("join", prefix, reduction, workers)
        except Exception as error:
            if not self.prefixes:
                self.undo.close()
            hint = "; run `wandb login`, set WANDB_API_KEY or pass mode='offline'" if "API key" in str(error) else ""
            why = line(error).removesuffix(". Use `wandb login` to log in")
            kind = RuntimeError if isinstance(error, ActorGoneError) else type(error)
            raise kind(f"W&B run {self.letter.address.name!r} can't start: {why}{hint}") from None
        except BaseException as error:  # Ctrl-C, or what a signal handler raises: let it get ready, and end as that
            with contextlib.suppress(Exception):
                ask("join", prefix, reduction, workers)
                ask("finish", *exits.how_it_ends(error), prefix if self.prefixes else None)
                if not self.prefixes:
                    self.leave()
            raise
        self.prefixes.append(prefix)
        return started

    def leave(self) -> None:
        """Nothing of the run is needed any more: its ledgers have arrived."""
        # The option is not at the method, because common.py could not be imported then where Ray Client is.
        self.actor.leave.options(max_task_retries=0).remote()
        forget(self.letter.address)

    def watch(self) -> None:
        """In a thread: calls `stop` once, when somebody presses "Stop run" on the run's page; keeps the outbox there.

        Not by a call of the actor that returns then: Ray lets no worker end by itself while it waits for an answer.
        """
        box, file = process.outbox(self.letter.address), self.letter.address.folder / exits.STOP

        def watch() -> None:
            stopped = False
            while not box.is_finished and not box.is_closed:
                with contextlib.suppress(RuntimeError):  # the run is finished
                    box.keep_reachable(time.monotonic())
                if not stopped and (stopped := file.exists()):
                    self.stop()
                time.sleep(1)

        threading.Thread(target=watch, daemon=True).start()


def forget(address: Address) -> None:
    """Nothing of a run of this process is needed any more."""
    process.forget(address)
    shutil.rmtree(address.folder, ignore_errors=True)


def start_actor(pipeline: Any, init: dict[str, Any]) -> Owned:
    """Starts the pipeline actor on this node, where the run's folder and the login are.

    pipeline: the actor class. init: for `wandb.init`. Raises ValueError, TypeError or OSError for what can't work; then
    nothing is left of it.
    """
    context, init, directory = get_runtime_context(), arguments.as_given(init), _directory()
    with contextlib.ExitStack() as undo:
        nonce = uuid.uuid4().hex
        environ, claim, aside = environment_of_actor(init.get("id"), nonce)
        undo.callback(ray_internals.release, claim, nonce)
        own = dict(id=uuid.uuid4().hex[:8], dir=".", job_type=pipeline.job_type)
        init = arguments.complete(init, own, environ)
        if aside:
            logger.warning("run %s %s", init.get("name") or init["id"], aside)
        stop = init["settings"].pop("stop_fn", None) or exits.interrupt
        folder = Path(tempfile.mkdtemp(prefix="wandb-run-"))  # with mode 0700
        name = init.get("name") or init["id"]
        address = Address(name, nonce, folder, this_machine(), this_view(), context.get_node_id())
        undo.callback(forget, address)
        box = process.outbox(address)
        box.open()
        job = "" if ray_internals.in_driver() else context.get_job_id()
        told = Letter(address, box.process.name, job, init, environ, directory, command_line())
        write_letter(told)
        make_runs_folder(init["dir"])
        ray_internals.put(address.key("open"), b"")
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        options = dict(name=address.actor, namespace=NAMESPACE, scheduling_strategy=here)
        actor = pipeline.options(**options).remote(address.folder)
        undo.callback(ray.kill, actor)
        return Owned(actor, told, stop, undo.pop_all())


def _directory() -> str:
    """Where this process is. Raises FileNotFoundError if somebody has removed it: wandb starts in none."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("the working directory is gone: call os.chdir() with one that is there") from None


def environment_of_actor(own_id: str | None, nonce: str) -> tuple[dict[str, str], str, str]:
    """The variables that a run's actor gets; the claim of the ids among them; why it gets no ids, if it doesn't.

    An id of a run or a sweep is for one run: the first that claims it. own_id: the run's id, if the code says so.
    """
    # What `ray.init(runtime_env={"env_vars": …})` says, the driver's own environment has not.
    job = get_runtime_context().runtime_env.get("env_vars") or {}
    environ = {name: os.path.expandvars(value) for name, value in job.items()} | dict(os.environ)
    environ = {k: v for k, v in environ.items() if k.startswith("WANDB_") or k.upper() in NETWORK}
    environ.pop("WANDB_SERVICE", None)  # of wandb in this process
    run, sweep = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
    claim = f"{run}/{sweep}"
    if not (run or sweep):
        return environ, claim, ""
    if own_id in (None, run) and ray_internals.claim(claim, nonce):
        return environ, claim, ""
    for name in ONE_RUN:
        environ.pop(name, None)
    what = f"the sweep {sweep}" if sweep else f"WANDB_RUN_ID={run}"
    return environ, claim, f"stays outside {what}, which is for one run"


def command_line() -> list[str]:
    """Program and arguments of this process; in a worker of Ray's those of its job's driver."""
    if ray_internals.in_driver():
        main = sys.modules["__main__"]
        module = getattr(main, "__spec__", None)  # of `python -m`
        return [f"-m {module.name}" if module else getattr(main, "__file__", NO_PROGRAM), *sys.argv[1:]]
    words = ray_internals.command(get_runtime_context().get_job_id()).split()
    words = words[1:] if words[:1] == [sys.executable] else words
    if words[:1] == ["-m"]:
        return [" ".join(words[:2]), *words[2:]]
    return [NO_PROGRAM] if words[:1] in ([], ["-c"]) else words


def finish_without_actor(run: Owned, why: Exception, begun: Ledger) -> Ledgers:
    """Has a run of this process finished whose actor can't be reached. Its exit code is in the outbox by now.

    begun: how the run began, for the ledgers if that fails.
    """
    letter, folder, stderr = run.letter, run.letter.address.folder, b""
    if ray_internals.which_ray() and ray_internals.ray_answers():
        ray_internals.delete(letter.address.key("open"))  # after that nobody begins to log elsewhere
        places = ray_internals.keys(letter.address.key("place"))
        with contextlib.suppress(OSError):  # the folder is gone
            write_private(folder / PLACES, pickle.dumps([key.decode().rpartition("/")[2] for key in places]))
        for place in places:
            ray_internals.delete(place)
    finishing = recover.start(folder)
    settings = letter.init["settings"]
    upload = float(settings.get("finish_timeout", letter.environ.get("WANDB_FINISH_TIMEOUT") or 60))
    seconds = 30 + upload if upload else None
    with contextlib.suppress(subprocess.TimeoutExpired):  # then it goes on
        _, stderr = finishing.communicate(timeout=seconds)
    if (folder / LEDGERS).exists():
        ledgers = recover.read_ledgers(folder)
        forget(letter.address)
        return ledgers
    process.forget(letter.address)  # the folder stays, so that somebody can try again
    problem = recover.reason(stderr, folder) or f"that takes more than {seconds} s"
    told = [f"the pipeline actor can't be reached: {line(why)}", f"the run could not be finished: {problem}"]
    lost = dataclasses.replace(begun, unheard=["all places"], warnings=told)
    return {prefix: dataclasses.replace(lost, prefix=prefix) for prefix in run.prefixes}
