"""The pipeline actor: hosts a run, reads what its workers log, and goes on where it was when it had died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from . import staging
from .host import Host
from .ledger import Ledger, Ledgers, RunFinishedError, account
from .reduction import Reduction
from .run import Started


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
        staging.put_piece(to, offset, piece)

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
