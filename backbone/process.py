"""What a process knows of itself: who logs in it, which Ray it is in, and which outboxes it has."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import threading
import uuid
from pathlib import Path

from ray.runtime_context import get_runtime_context  # `ray.get_runtime_context` starts a Ray where there is none

from . import nodes, ray_internals
from .files import CLOSED_FOLDER, OUTBOXES, Address, digest, fcntl, make_private_folder, this_machine, this_view
from .ledger import RunFinishedError, run_is_finished
from .outbox import Outbox
from .ray_internals import which_ray

logger = logging.getLogger("wandb_run")
_outboxes: dict[str, Outbox] = {}  # of this process, by the nonce of the run


def _new_name() -> str:
    return f"process {os.getpid()}-{uuid.uuid4().hex[:6]} on {socket.gethostname()}"


_name = _new_name()


class Process:
    """A process without Ray.

    counted_as: the worker that it is counted as, if it is a child of a process that logs, too.
    """

    in_task, ray = False, None
    task = ""  # what all attempts of a task share

    def __init__(self, counted_as: str = ""):
        self.name = self.worker = _name  # this process; the worker that has logged last in it
        self.counted_as = counted_as

    @property
    def children_counted_as(self) -> str:
        """The worker that children of this process are counted as."""
        return self.counted_as or self.worker

    def who(self) -> str:
        """The worker that logs now."""
        return self.name

    def note_task(self) -> None:
        """Remembers which task runs, as long as its main thread asks: its other threads can't find that out."""

    def find_folder(self, address: Address) -> Path:
        """The folder of a run's outboxes on this node. Raises RunFinishedError, and RuntimeError where there is none.

        Where this is another node than the run's, it tells the run that there is such a folder.
        """
        folder = address.folder if address.is_here else self._find_elsewhere(address)
        if (folder / CLOSED_FOLDER).exists():
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
        self.ray, self.node, self._attempt = which_ray(), get_runtime_context().get_node_id(), (None, 0)
        self._is_driver, actor = ray_internals.in_driver(), ray_internals.actor_kind()
        self.in_task = not self._is_driver and not actor
        self.task = self.name if self.in_task else ""
        if actor:
            self.name = self.worker = self.name.replace("process", actor, 1)

    def who(self) -> str:
        if self._is_driver and which_ray() is not self.ray:
            raise RuntimeError("Ray is not running any more, so nothing can be logged")
        self.note_task()
        return self.worker

    def note_task(self) -> None:
        if self.in_task and threading.current_thread() is threading.main_thread():  # other threads have no task's id
            task, attempt = get_runtime_context().get_task_id(), ray_internals.current_attempt()
            if (task, attempt) != self._attempt:  # a retry may come in the same process, and has the same id
                self.worker = f"task {task[:16]} {attempt} on {socket.gethostname()}" if task else self.name
                self.task, self._attempt = task[:16] if task else self.name, (task, attempt)

    def _find_elsewhere(self, address: Address) -> Path:
        self._check_open(address)
        if (self.node, this_view()) == (address.node, address.view):
            logger.warning("run %s: %s is gone, and made anew", address.name, address.folder)
            make_private_folder(address.folder)
            return address.folder
        folder = address.elsewhere
        make_private_folder(folder)
        place = f"{self._reader_of(folder)} {digest(folder)}"
        ray_internals.put(address.key("place", place), os.fsencode(folder))
        self._check_open(address)  # again: who finishes the run deletes that key, and then looks for places
        (folder / "known").touch()
        return folder

    def _reader_of(self, folder: Path) -> str:
        """The node whose relay reads a folder: where several nodes of Ray are on one machine, one of them does."""
        link, lock = folder / "node", os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not link.is_symlink():
                link.symlink_to(self.node)
            elif os.readlink(link) != self.node and not nodes.is_alive(os.readlink(link)):
                link.unlink()
                link.symlink_to(self.node)
            return os.readlink(link)
        finally:
            os.close(lock)

    def _check_open(self, address: Address) -> None:
        if ray_internals.get(address.key("open")) is None:
            raise run_is_finished(address.name)


def outbox(address: Address, counted_as: str = "") -> Outbox:
    """This process's outbox for a run. counted_as: see `Process`."""
    found = _outboxes.get(address.nonce)
    if not found:
        for nonce in [nonce for nonce, other in _outboxes.items() if other.is_closed and not other.copies]:
            _outboxes.pop(nonce).close(finished=True)
        process = RayProcess() if which_ray() else Process(counted_as)
        found = _outboxes.setdefault(address.nonce, Outbox(address, process))
    found.process.note_task()
    return found


def in_its_ray(address: Address) -> bool:
    """Whether this process is in a Ray, and in that in which it has used a run."""
    box = _outboxes.get(address.nonce)
    return bool(which_ray()) and (not box or box.process.ray in (None, which_ray()))


def forget(address: Address) -> None:
    """A run of this process is finished."""
    if which_ray() and ray_internals.ray_answers():
        ray_internals.delete(address.key("open"))
    if box := _outboxes.pop(address.nonce, None):
        box.close(finished=True)


def _before_fork() -> None:
    for box in [*_outboxes.values()]:
        box.hand_on()


def _after_fork() -> None:
    global _name
    _name = _new_name()
    ray_internals.leave()
    for box in _outboxes.values():
        box.begin_in_fork(Process(box.process.children_counted_as))


def _at_exit() -> None:
    for box in [*_outboxes.values()]:
        box.say_exit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
atexit.register(_at_exit)
