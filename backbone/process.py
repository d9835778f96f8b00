"""What a process knows of itself: who logs in it, which Ray it is in, and which outboxes it has."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray.experimental import internal_kv
from ray.runtime_context import get_runtime_context  # `ray.get_runtime_context` starts a Ray where there is none

from .files import CLOSED, OUTBOXES, Address, make_private_folder, this_machine
from .ledger import RunFinishedError, run_is_finished
from .outbox import Outbox
from .run import DEATHS

logger = logging.getLogger("wandb_run")
KV, NAMESPACE = b"wandb_run", "wandb_run"  # in the key-value store of Ray's GCS; of the actors' names
_new_name = lambda: f"process {os.getpid()}-{uuid.uuid4().hex[:6]} on {socket.gethostname()}"  # noqa: E731
_name = _new_name()
_left: object = None  # the Ray of the process that this one is a fork of
_outboxes: dict[str, Outbox] = {}  # by the nonce of the run


def which_ray() -> object:
    """The Ray that this process is in, None if it is in none. A fork is not in the Ray of its parent.

    To be asked before a call of an actor: where Ray is not running any more, the call would start another one.
    """
    worker = ray._private.worker
    return worker._global_node if worker.global_worker.connected and worker._global_node is not _left else None


class Process:
    """A process without Ray.

    speaks_for: the worker that it is counted as, if it is a child of a process that logs, too.
    """

    in_task, ray, node = False, None, ""

    def __init__(self, speaks_for: str = ""):
        self.name = self.last = _name  # who logs here; who has logged last
        self.parent = speaks_for

    @property
    def speaker(self) -> str:
        """The worker that children of this process are counted as."""
        return self.parent or self.last

    def who(self) -> str:
        """The worker that logs now."""
        return self.name

    def note_task(self) -> None:
        """A handle has arrived, maybe with a task of whose threads only others will log."""

    def about(self) -> dict[str, Any]:
        """What the reader of its outboxes must know."""
        return dict(pid=os.getpid(), name=self.name, parent=self.parent, ray=bool(self.ray))

    def find_folder(self, address: Address) -> Path:
        """The folder of a run's outboxes on this node. Raises RunFinishedError, and RuntimeError where there is none.

        Where this is another node than the run's, it tells the run that there is such a folder.
        """
        folder = address.folder if address.is_here else self._find_elsewhere(address)
        if (folder / CLOSED).exists():
            raise run_is_finished(address.name)
        outboxes = folder / OUTBOXES
        with contextlib.suppress(FileExistsError):  # `exist_ok=True` takes a signal handler's TimeoutError, too
            outboxes.mkdir()
        return outboxes

    def _find_elsewhere(self, address: Address) -> Path:
        folder = address.elsewhere
        if not (folder / "known").exists():
            where = "is finished, or" if address.machine == this_machine() else "is on another machine, and"
            hint = "log, or pickle the handle, in the Ray worker that started this process"
            raise RunFinishedError(f"run {address.name!r} {where} nobody has told it of this process: {hint}")
        return folder


class RayProcess(Process):
    """A process with Ray: a driver, or a worker that runs an actor or plain tasks."""

    def __init__(self) -> None:
        super().__init__()
        context = get_runtime_context()
        self._worker, self.ray, self.node = context.worker, which_ray(), context.get_node_id()
        self._is_driver, actor = context.worker.mode != ray.WORKER_MODE, context.get_actor_id()
        self.in_task = not self._is_driver and not actor
        if actor:
            instance = self._worker.actors.get(self._worker.actor_id)  # not there yet in its constructor
            kind = type(instance).__name__ if instance is not None else "actor"
            self.name = self.last = self.name.replace("process", kind, 1)
        self._task = b""

    def who(self) -> str:
        if self._is_driver and which_ray() is not self.ray:
            raise RuntimeError("Ray is not running any more, so nothing can be logged")
        self.note_task()
        return self.last

    def note_task(self) -> None:
        if self.in_task and threading.current_thread() is threading.main_thread():  # other threads have no task's id
            task = self._worker.core_worker.get_current_task_id().binary()
            if task != self._task:
                self._task = task
                number = get_runtime_context().get_task_id(), self._worker.core_worker.get_current_task_attempt_number()
                self.last = f"task {number[0][:16]} {number[1]} on {socket.gethostname()}" if number[0] else self.name

    def _find_elsewhere(self, address: Address) -> Path:
        if not internal_kv._internal_kv_exists(address.key("open"), namespace=KV):
            raise run_is_finished(address.name)
        if self.node == address.node:
            logger.warning("run %s: %s is gone, and made anew", address.name, address.folder)
            make_private_folder(address.folder)
            return address.folder
        folder = address.elsewhere
        make_private_folder(folder)
        internal_kv._internal_kv_put(address.key("place", self.node), os.fsencode(folder), namespace=KV)
        if not internal_kv._internal_kv_exists(
            address.key("open"), namespace=KV
        ):  # who finishes it looks for places later
            raise run_is_finished(address.name)
        (folder / "known").touch()
        return folder


def this_process(speaks_for: str = "") -> Process:
    return RayProcess() if which_ray() else Process(speaks_for)


def outbox(address: Address, speaks_for: str = "") -> Outbox:
    """This process's outbox for a run. speaks_for: see `Process`."""
    found = _outboxes.get(address.nonce)
    if not found:
        for nonce in [nonce for nonce, other in _outboxes.items() if other.is_closed]:
            _outboxes.pop(nonce).close(finished=True)
        found = _outboxes.setdefault(address.nonce, Outbox(address, this_process(speaks_for)))
    found.process.note_task()
    return found


def forget(address: Address) -> None:
    """A run of this process is finished."""
    if which_ray() and ray_answers():
        internal_kv._internal_kv_del(address.key("open"), namespace=KV)
    if box := _outboxes.pop(address.nonce, None):
        box.close(finished=True)


def _after_fork() -> None:
    global _name, _left
    _name, _left = _new_name(), which_ray() or _left
    for box in _outboxes.values():
        box.begin_in_fork(Process(box.process.speaker))


def _at_exit() -> None:
    for box in [*_outboxes.values()]:
        box.say_exit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


# Calls of the pipeline actor


class ActorGoneError(RuntimeError):
    """The pipeline actor is gone for good, or all of Ray is."""


def call(address: Address, actor: ray.actor.ActorHandle | None, method: str, *arguments: Any) -> Any:
    """Calls a method of a run's pipeline actor, which is looked up where there is no handle of it.

    To look it up waits for ever where Ray's GCS has just died, so the run's owner does without.
    Raises what the method raised, RunFinishedError where the actor has left, or ActorGoneError.
    """
    here, box = which_ray(), _outboxes.get(address.nonce)
    if not here or (box and box.process.ray not in (None, here)) or not ray_answers():
        raise ActorGoneError("Ray is not running any more")
    try:
        actor = actor or ray.get_actor(address.actor, namespace=NAMESPACE)
    except ValueError:
        if not internal_kv._internal_kv_exists(address.key("open"), namespace=KV):
            raise run_is_finished(address.name) from None
        raise ActorGoneError("it was killed, or is in another Ray") from None
    return result(getattr(actor, method).remote(*arguments), actor)


def result(ref: ray.ObjectRef, actor: ray.actor.ActorHandle) -> Any:
    """What a call has returned or raised. It is waited for in Python: what waits inside a Ray that is gone hangs."""
    future, before, refused = ref.future(), None, 0
    while not wait([future], timeout=1.0).done:
        refused = 0 if ray_answers() else refused + 1
        if refused == 3:  # times in a row: a GCS may restart
            raise ActorGoneError("Ray is not running any more")
        if refused:
            continue
        restarts = state.actors(actor._actor_id.hex()).get("NumRestarts", 0)
        before = restarts if before is None else before
        if (deaths := restarts - before) > DEATHS:
            ray.kill(actor)
            raise ActorGoneError(f"given up: it died {deaths} times without an answer")
    error = future.exception()
    if isinstance(error, ray.exceptions.RayTaskError):
        raise error.cause from None
    if isinstance(error, ray.exceptions.RayError):
        if "INTENDED_USER_EXIT" in str(error):
            raise RunFinishedError("the run is finished")
        raise ActorGoneError(plain(error))
    return future.result()


def ray_answers() -> bool:
    """Whether something listens at the address of the cluster's GCS. Who asks one that is gone waits for ever."""
    try:
        host, _, port = get_runtime_context().gcs_address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # it is slow
    except Exception:  # Ray has left this process
        return False
    return True


def has_ended(job: str) -> bool:
    """Whether Ray knows within two seconds that a job has ended."""
    deadline = time.monotonic() + 2
    while ray_answers() and time.monotonic() < deadline:
        if any(found["JobID"] == job and found["IsDead"] for found in state.jobs()):
            return True
        time.sleep(0.1)
    return False


def plain(error: BaseException) -> str:
    """What an error of Ray's says, in one line without colours; of an actor that could not start, its own error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first, _, last = text.partition("\n")[0], "", text.rpartition("\n")[2]
    return (last if "creation task" in first or "is dead because" in last else first).rstrip(".")
