"""The process that a run belongs to, as the pipeline actor sees it: whether it is there, and how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray._private import state
from ray.core.generated import common_pb2, gcs_pb2
from ray.runtime_context import get_runtime_context

from . import guest
from .calls import ray_answers
from .ending import appoint_heir
from .files import fcntl
from .ledger import RunFinishedError, line

logger = logging.getLogger("wandb_run")


def watch(path: Path, letter: guest.Letter, finish: Callable[..., object], forget: Callable[[], None]) -> None:
    """Finishes the run of a letter, which is at `path`, when its owner is gone; then ends this actor.

    Where Ray is gone with the owner, it leaves an actor two seconds at most; then its heir does it.
    """
    raylet = os.getppid()
    if not fcntl:  # Windows: it is not watched
        return
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # waits until the owner is gone, or lets go of the letter
    # Without a letter the run is finished, and this actor told to leave; unless that got lost, or somebody cleaned up.
    deadline = time.monotonic() + 10
    while not path.exists() and os.getppid() == raylet and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        letter = guest.read_letter(path) if path.exists() else letter
        ended = letter.ended or (1, "the process that the run belonged to is gone")
        if letter.ray_worker and not letter.ended and _has_returned(letter.ray_worker):
            ended = 0, None
        with contextlib.suppress(Exception):  # without an heir it goes on, too
            _heir = path.exists() and appoint_heir(path, letter, *ended)  # which waits as long as this is kept
        with contextlib.suppress(RunFinishedError):  # or it has never begun
            finish(*ended, wait=5 if letter.ray_worker else 0.5)
        forget()
    except Exception as error:  # the heir tries once more; else the store stays, for the next run of that id
        logger.warning("run %s could not be finished: %s", letter.init["id"], line(error))
    if os.getppid() != raylet:  # all of Ray is gone
        os._exit(0)
    ray.kill(get_runtime_context().current_actor)


def _has_returned(ray_worker: str) -> bool:
    """Whether an ended worker of Ray's was meant to end, as Ray's GCS tells when it has heard of it."""
    deadline = time.monotonic() + 2
    while ray_answers() and time.monotonic() < deadline:
        for raw in state.state._connect_and_get_accessor().get_worker_table():
            data = gcs_pb2.WorkerTableData.FromString(raw)
            if data.worker_address.worker_id.hex() == ray_worker and not data.is_alive:
                intended = common_pb2.INTENDED_SYSTEM_EXIT, common_pb2.INTENDED_USER_EXIT
                return data.exit_type in intended
        time.sleep(0.1)
    return False
