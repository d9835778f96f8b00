"""Opens a run as whoever had it before has left it: an actor that died, or an earlier run of its id.

Besides tables a state has these facts of the run, by name:

address                         of its private folder; `earlier`: facts of the earlier run, until this one has started
id, name, mode, url, paths      of the W&B run, with all its folders; `begun`: it was started in this life of the id
first                           the lowest number that a row may have, because W&B has the ones below
clock                           of the steps, in seconds
places                          on other nodes that have outboxes
owner_end, end                  exit code and failure: as the owner has ended, and as `finish` was told
restarts, deaths                of the actor; those in a row without a row of the run; `rows_at_restart`
warnings, unheard               first of a kind and how many; places where reports may be missing
refused, lost_artifacts         how many values besides metrics, and artifacts, W&B has not taken
config, summary, used_artifacts what workers have said, to be told again after a restart; `said`: not told yet
alerted                         title -> when it went out
increments                      of growing tables: key -> what W&B has
tried_again                     a new process was tried, because wandb-core had not written all rows
uploaded, ledgers               in the end
"""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import LEDGERS, Address, is_private_folder, state_path
from .run import Run
from .said import KNOWN
from .state import State

DEATHS = 3  # of a pipeline actor in a row; after more it is given up
GIVEN_BACK = ("address", "begun", "deaths", "end", "owner_end", *KNOWN)  # facts of an earlier run, if this can't start
PLACES = "places"  # a file in the private folder: other places that have outboxes, as far as the owner knows


class GivenUpError(RuntimeError):
    """The pipeline actor is not to go on."""


def open_run(
    init: dict[str, Any], address: Address, owner: str, lock: threading.RLock, hear: Callable[[str], None] | None = None
) -> Run:
    """Starts a run, whose state is new or not, and counts the actor's restart. For the arguments see `Run`.

    hear: is told warnings.

    Raises GivenUpError after some deaths of actors without a row in between, or where another process has finished the
    run meanwhile, OSError where the id is in use.
    """
    folder = Path(init["dir"], "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    state = State(state_path(folder, init["project"], init["id"], address.folder.parent))
    before = state.facts.get("address")
    if not before and ((address.folder / LEDGERS).exists() or not is_private_folder(address.folder)):
        state.remove()  # it is new: whoever has finished the run has written the ledgers, and then removed the old one
        raise GivenUpError("another process has finished the run, or its private folder is gone")
    if before and before.nonce == address.nonce:
        run = Run(state, init, address, owner, lock)
        _count_restart(run)
    else:
        if before and state.is_finished:
            state.remove()
            state = State(state.path)
        elif before:
            _end_earlier(Run(state, init, before, owner, lock))
        run = Run(state, init, address, owner, lock)
        _begin(run)
    state.commit()
    state.hear = hear or state.hear
    try:
        run.start()
    except Exception:
        _give_back(run)
        raise
    if earlier := state.facts.get("earlier"):
        state.note(earlier=None)
        shutil.rmtree(earlier["address"].folder, ignore_errors=True)
    return run


def _give_back(run: Run) -> None:
    """It could not start. What there was before belongs to whoever had it."""
    if earlier := run.state.facts.get("earlier"):
        run.state.note(**earlier, earlier=None)
        run.state.commit()
    if run.pipelines or run.state.facts.get("restarts"):  # somebody has logged
        run.state.close()
    else:
        run.state.remove()


def _begin(run: Run) -> None:
    run.state.note(address=run.address, deaths=0, begun=False, end=None, **KNOWN)
    lost = run.address.folder / "pipelines"
    if lost.exists():  # it is the state of this very run that was there
        run.state.unheard("the time before the run's state was lost")
        for prefix, reduction, workers in pickle.loads(lost.read_bytes()):
            run.add(prefix, reduction, workers)


def _count_restart(run: Run) -> None:
    # Of a disabled run no row is on the disk.
    [(arrived,)] = run.state.db.execute("SELECT count(*) FROM rows WHERE metrics IS NULL")
    rows, facts = max(arrived, len(run.writer.logs.numbers)), run.state.facts
    deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
    run.state.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
    if deaths > DEATHS:
        run.state.commit()
        run.state.close()
        raise GivenUpError(f"given up: the pipeline actor died {deaths} times without a row in between")


def _end_earlier(run: Run) -> None:
    """Makes rows of all that is left of an earlier run, whose process did not finish it. This one goes on with them."""
    read_what_is_left(run, time.monotonic() + 10)
    run.state.do("DELETE FROM outboxes")
    run.state.note(earlier={name: run.state.facts.get(name) for name in GIVEN_BACK}, owner_end=None)
    run.state.commit()


def read_what_is_left(run: Run, deadline: float) -> None:
    """Makes rows of all that can be read here, and names the other places."""
    run.read_to_end(deadline)
    noted = run.address.folder / PLACES
    for place in run.inbox.places | set(pickle.loads(noted.read_bytes()) if noted.exists() else ()):
        run.inbox.place_is_gone(place, "what was logged there at last")
    run.end(run.pipelines, deadline)
