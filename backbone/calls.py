"""Calls of a run's pipeline actor, from any process, whatever has become of the actor and of Ray."""

from __future__ import annotations

import re
from concurrent.futures import wait
from typing import Any

import ray

from . import process, ray_internals
from .files import Address
from .ledger import RunFinishedError, run_is_finished
from .ray_internals import ray_answers
from .takeover import DEATHS

NAMESPACE = "wandb_run"  # of the actors' names


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
