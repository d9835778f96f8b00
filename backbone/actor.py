"""The pipeline actor: hosts a run, reads what its workers log, and goes on where it was when it had died.

It can be called from any process, whatever has become of the actor and of Ray.
"""

from __future__ import annotations

import re
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray

from . import process, ray_internals
from .files import Address
from .host import Host
from .ledger import Ledger, Ledgers, RunFinishedError, account, run_is_finished
from .ray_internals import ray_answers
from .reduction import Reduction
from .run import Started
from .takeover import DEATHS

NAMESPACE = "wandb_run"  # of the actors' names


class PipelineActor:
    """Owns a W&B run, and reduces the reports of its pipelines' workers to one row per step.

    Undecorated, because Ray can't inherit from a decorated class. For a pipeline of your own derive a class, set the
    three attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares another one's run and is given none
    job_type: str | None = None
    reduction = Reduction()

    def __init__(self, folder: Path):
        self._host = Host(folder)

    def join(self, prefix: str, reduction: Reduction, workers: int) -> Started:
        """Adds a pipeline to the run, which the first one starts."""
        with self._host.lock:
            if self._host.run and self._host.run.state.is_finished:
                raise RunFinishedError("the run is finished")
            if self._host.run is None:
                try:
                    self._host.begin()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kinds = (kind for kind in (TypeError, ValueError, OSError) if isinstance(error, kind))
                    raise next(kinds, RuntimeError)(" ".join(str(error).split())[:500]) from error
            return self._host.run.join(prefix, reduction, workers)

    def progress(self, prefix: str) -> tuple[Ledger, dict[str, Any]]:
        """The ledger so far, and the numbers of the row of the highest step (keys without prefix)."""
        with self._host.lock:
            run = self._host.run
            if not run or run.state.is_finished:
                raise RunFinishedError("the run is finished")
            pipeline = run.pipeline(prefix)
            return account(run.state, pipeline), pipeline.last_row

    def stage(self, to: Path, offset: int, piece: bytes) -> None:
        """Writes a piece of a file from another node."""
        to.parent.mkdir(parents=True, exist_ok=True)
        to.touch()
        with to.open("r+b") as file:
            file.seek(offset)
            file.write(piece)

    def finish(self, exit_code: int, failure: str | None = None, prefix: str | None = None) -> Ledgers:
        """See `Host.finish`."""
        return self._host.finish(exit_code, failure, prefix)

    def leave(self) -> None:
        """The ledgers have arrived, so nothing of this is needed any more."""
        self._host.forget()
        ray.actor.exit_actor()


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its owner until the run is finished."""
    if not issubclass(cls, PipelineActor):
        raise TypeError(f"{cls.__name__} must be derived from PipelineActor")
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    # Calls at the same time, because they must be answered while one of them starts the run, or finishes it.
    # pyrefly: ignore[unexpected-keyword] - Ray's own types lack some of its options
    return ray.remote(max_concurrency=9, num_cpus=0, **lives)(cls)


class ActorGoneError(RuntimeError):
    """The pipeline actor is gone for good, or all of Ray is."""


def call(address: Address, actor: ray.actor.ActorHandle | None, method: str, *arguments: Any) -> Any:
    """Calls a method of a run's pipeline actor, which is looked up where there is no handle of it.

    To look it up waits for ever where Ray's GCS has just died, so the run's owner does without.
    Raises what the method raised, RunFinishedError where the actor has left, or ActorGoneError.
    """
    if not process.in_its_ray(address) or not ray_answers():
        raise ActorGoneError("Ray is not running any more")
    try:
        actor = actor or ray.get_actor(address.actor, namespace=NAMESPACE)
    except ValueError:
        if ray_internals.get(address.key("open")) is None:
            raise run_is_finished(address.name) from None
        raise ActorGoneError("it was killed, or is in another Ray") from None
    try:
        return result(getattr(actor, method).remote(*arguments), actor)
    except RunFinishedError:
        raise run_is_finished(address.name) from None


def result(ref: ray.ObjectRef, actor: ray.actor.ActorHandle) -> Any:
    """What a call has returned or raised. It is waited for in Python: what waits inside a Ray that is gone hangs."""
    future, before, refused = ref.future(), None, 0
    while not wait([future], timeout=1.0).done:
        refused = 0 if ray_answers() else refused + 1
        if refused == 3:  # times in a row: a GCS may restart
            raise ActorGoneError("Ray is not running any more")
        if refused:
            continue
        restarts = ray_internals.restarts(actor)
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


def uncoloured(error: BaseException) -> str:
    """All that an error of Ray's says, with the worker's traceback if it is one of a worker's."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


def plain(error: BaseException) -> str:
    """What an error of Ray's says, in one line without colours; of an actor that could not start, its own error."""
    lines = uncoloured(error).splitlines() or [""]
    is_in_the_last = "creation task" in lines[0] or "is dead because" in lines[-1]
    return lines[-1 if is_in_the_last else 0].rstrip(".")
