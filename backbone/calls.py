"""Calls of the pipeline actor that are waited for: in Python, because what waits inside Ray hangs when Ray is gone."""

from __future__ import annotations

import re
import socket
from concurrent.futures import wait
from typing import Any

import ray
from ray._private import state
from ray.runtime_context import get_runtime_context

from . import process
from .ledger import RunFinishedError
from .run import DEATHS


class ActorGoneError(RuntimeError):
    """The pipeline actor is gone for good, or all of Ray is."""


def answer(method: ray.actor.ActorMethod, *arguments: Any) -> Any:
    """Calls a method of the pipeline actor. Raises what the method raised, or ActorGoneError."""
    if not process.which_ray():
        raise ActorGoneError("Ray is not running any more")
    try:
        call = method.remote(*arguments)
    except Exception as error:
        if type(error) is Exception:  # which Ray has no class of its own for
            raise ActorGoneError("it was in a Ray that this process has left") from None
        raise
    return result(call, method._actor)


def result(call: ray.ObjectRef, actor: ray.actor.ActorHandle) -> Any:
    """What a call of the actor has returned or raised; ActorGoneError where it can't any more."""
    future, before, refused = call.future(), None, 0
    process.when_done(future, lambda _: None)  # so that the thread in which answers come is known early
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
        raise RunFinishedError("the run is finished") if has_left(error) else ActorGoneError(plain(error))
    return future.result()


def has_left(error: BaseException) -> bool:
    """Whether an actor is gone because its run is finished."""
    return "INTENDED_USER_EXIT" in str(error)


def ray_answers() -> bool:
    """Whether something listens at the address of the cluster's GCS."""
    try:
        host, _, port = get_runtime_context().gcs_address.rpartition(":")
    except Exception:  # where Ray has left this process
        return False
    return not is_refused(host.strip("[]"), int(port))


def is_refused(host: str, port: int) -> bool:
    """Whether nobody listens there, on a machine that is there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def plain(error: BaseException) -> str:
    """What an error of Ray's says, in one line without colours; of an actor that could not start, its own error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first, _, last = text.partition("\n")[0], "", text.rpartition("\n")[2]
    return (last if "creation task" in first or "is dead because" in last else first).rstrip(".")
