"""Opens a run as whoever had it before has left it: an actor that died, or an earlier run of its id."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import Address, state_path
from .run import Run
from .state import State

DEATHS = 3  # of a pipeline actor in a row; after more it is given up


class GivenUpError(RuntimeError):
    """The pipeline actor dies whenever it goes on."""


def open_run(
    init: dict[str, Any],
    address: Address,
    owner: str,
    lock: threading.Condition | threading.RLock,
    stop: Callable[[], None] | None = None,
) -> Run:
    """Opens a run, whose state is new or not, and counts the actor's restart. For the arguments see `Run`.

    Raises GivenUpError after some deaths of actors without a row in between, OSError where the id is in use.
    """
    folder = Path(init["dir"], "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    state = State(state_path(folder, init["id"]))
    before = state.facts.get("address")
    if before and before.nonce == address.nonce:
        run = Run(state, init, address, owner, lock, stop)
        _count_restart(run)
    else:
        if before and "ledgers" in state.facts:
            state.remove()
            state = State(state.path)
        elif before:
            _end_earlier(Run(state, init, before, owner, lock))
        run = Run(state, init, address, owner, lock, stop)
        _begin(run)
    state.commit()
    return run


def _begin(run: Run) -> None:
    run.state.note(address=run.address, deaths=0, begun=False)
    lost = run.address.folder / "pipelines"
    if lost.exists():  # it is the state of this very run that was there
        run.inbox.unheard("the time before the run's state was lost")
        for prefix, reduction, workers in pickle.loads(lost.read_bytes()):
            run.add(prefix, reduction, workers)


def _count_restart(run: Run) -> None:
    rows, facts = len(run.writer.logs.there), run.state.facts
    deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
    run.state.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
    if deaths > DEATHS:
        run.state.commit()
        run.state.close()
        raise GivenUpError(f"given up: the pipeline actor died {deaths} times without a row in between")


def _end_earlier(run: Run) -> None:
    """Makes rows of all that is left of an earlier run, whose process did not finish it. This one goes on with them."""
    run.read_to_end(time.monotonic() + 10)
    run.end(run.pipelines, time.monotonic() + 10)
    for place in run.inbox.places:
        run.inbox.place_is_gone(place, "the run's earlier life had outboxes there")
    run.state.do("DELETE FROM outboxes")
    run.state.note(owner_end=None)
    run.state.commit()
    shutil.rmtree(run.address.folder, ignore_errors=True)
