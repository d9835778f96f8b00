"""What a process knows of itself: who logs in it, which Ray it is in, and which of its threads must not wait."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import ray
from ray.runtime_context import get_runtime_context  # `ray.get_runtime_context` starts a Ray where there is none

_name = f"process {uuid.uuid4().hex}"  # who logs where no actor and no task does
forked_from: list[int] = []  # a process with Ray that this one is a fork of


def _after_fork() -> None:
    global _name  # noqa: PLW0603
    _name = f"process {uuid.uuid4().hex}"
    if ray.is_initialized():
        forked_from.append(os.getppid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Self(NamedTuple):
    """This process, as its Ray knows it."""

    place: tuple[str, int]  # node and process id
    worker: str  # who logs, but for tasks
    in_task: bool  # it runs plain tasks, and may end behind each of them
    in_async_actor: bool


def myself() -> Self:
    context = get_runtime_context()
    actor, worker = context.get_actor_id(), context.worker
    return Self(
        place=(context.get_node_id(), os.getpid()),
        worker=f"actor {actor}" if actor else _name,
        in_task=not actor and worker.mode == ray.WORKER_MODE,
        in_async_actor=bool(actor) and worker.core_worker.current_actor_is_asyncio(),
    )


def which_ray() -> object:
    """The Ray that this process is in, None if it is in none. A handle is of no use in another one.

    To be asked before a call of an actor: where Ray is not running any more, the call would start another one.
    """
    worker = ray._private.worker
    return worker._global_node if worker.global_worker.connected else None


def current_task() -> str:
    """The plain task that this thread runs. Other threads of a task have no id of it."""
    context = get_runtime_context() if ray.is_initialized() else None
    if not context or context.worker.mode != ray.WORKER_MODE:  # a driver, in which Ray warns of the question below
        return ""
    if context.get_actor_id() or threading.current_thread() is not threading.main_thread():
        return ""
    task = context.get_task_id()
    return f"task {task} {context.worker.core_worker.get_current_task_attempt_number()}" if task else ""


# Threads that must not wait for an outbox, because the outbox waits for them. Those of Ray's are not Python's own, so
# what a `threading.local` knows of them is gone behind each callback.
callback_threads: set[tuple[object, int]] = set()  # with the Ray that they are of


def when_done(future: Future, call: Callable[[Future], object]) -> None:
    """Has Ray's thread call this, and marks that thread. If the answer is there already, this thread calls."""
    asked, of = threading.get_ident(), which_ray()

    def called(done: Future) -> None:
        if threading.get_ident() != asked:
            callback_threads.add((of, threading.get_ident()))
        call(done)

    future.add_done_callback(called)
