"""How a run starts: its pipeline actor on the owner's node, then a pipeline that joins it."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.runtime_context import get_runtime_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import exits, guest
from .calls import ActorGoneError, answer, result
from .files import check_run_id
from .ledger import line
from .reduction import Reduction
from .run import Started

logger = logging.getLogger("wandb_run")


@dataclasses.dataclass
class Owned:
    """What the process that makes a run has of it."""

    actor: ray.actor.ActorHandle
    letter: guest.Letter
    path: Path  # of the letter
    stop: Callable[[], None]  # what "Stop run" does

    def forget(self) -> None:
        """The run is finished, or could not start."""
        guest.forget_letter(self.path)


def start_actor(pipeline: ray.actor.ActorClass, init: dict[str, Any]) -> Owned:
    """Starts the pipeline actor on this node, where the run's folder and the login are.

    init: for `wandb.init`. Raises ValueError for what can't work.
    """
    context, init = get_runtime_context(), guest.arguments(init)
    environ, aside = guest.travelling(init.get("id"))
    own = dict(id=uuid.uuid4().hex[:8], dir=".", job_type=pipeline.job_type)
    init = guest.complete(init, own, environ)
    check_run_id(init["id"])
    if aside:
        logger.warning("run %s %s", init.get("name") or init["id"], aside)
    stop = init["settings"].pop("stop_fn", None) or exits.interrupt
    ray_worker = context.get_worker_id() if context.worker.mode == ray.WORKER_MODE else None
    letter = guest.Letter(init, environ, os.getcwd(), guest.command_line(), ray_worker)
    path = guest.write_letter(letter)
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    return Owned(pipeline.options(scheduling_strategy=here).remote(path), letter, path, stop)


def join(
    actor: ray.actor.ActorHandle, prefix: str, reduction: Reduction, workers: int, what: str, owned: Owned | None
) -> Started:
    """Adds a pipeline to the actor's run, which the first one starts.

    owned: the run, where this is its first pipeline. what: its name, for an error.
    """
    joining = actor.join.remote(prefix, reduction, workers)
    try:
        return result(joining, actor)
    except KeyboardInterrupt:  # let it get ready, and record it as failed
        result(joining, actor)
        answer(actor.finish, 1, "KeyboardInterrupt", None if owned else prefix)
        raise
    except Exception as error:
        if owned:
            ray.kill(actor)
            owned.forget()
        hint = "; run `wandb login`, set WANDB_API_KEY or pass mode='offline'" if "API key" in str(error) else ""
        kind = RuntimeError if isinstance(error, ActorGoneError) else type(error)
        raise kind(f"W&B run {what} can't start: {line(error)}{hint}") from None
