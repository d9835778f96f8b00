"""Goes on with what a dead actor has left: an actor that was restarted, the next run of its id, and this program.

    python -m backbone.recover [FOLDER …]

finishes runs whose pipeline actor is gone, from what it has left on this node. A FOLDER is a run's private one,
`wandb-run-…` in the temporary folder. Without arguments these are all whose owner is dead, and whose state no process
has. The run's owner calls this as well, and so does an actor that may be killed before it is through. It joins no Ray,
so what workers logged on other nodes, and no relay has brought, is not read but named.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .files import Address, Letter, move_in, read_letter, state_path, write_private
from .inbox import GONE
from .ledger import Ledgers, line
from .page import is_alive
from .run import Run
from .state import State

DEATHS = 3  # of a pipeline actor in a row; after more it is given up
LEDGERS = "ledgers"  # a file in the private folder, when the run is finished


class GivenUpError(RuntimeError):
    """The pipeline actor dies whenever it goes on."""


def open_run(init: dict[str, Any], address: Address, owner: str, lock: threading.RLock) -> Run:
    """Opens a run, whose state is new or not, and counts the actor's restart. For the arguments see `Run`.

    Raises GivenUpError after some deaths of actors without a row in between, OSError where the id is in use.
    """
    folder = Path(init["dir"], "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    state = State(state_path(folder, init["id"]))
    before = state.facts.get("address")
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
    return run


def _begin(run: Run) -> None:
    run.state.note(address=run.address, deaths=0, begun=False, end=None, config={}, summary={})
    lost = run.address.folder / "pipelines"
    if lost.exists():  # it is the state of this very run that was there
        run.inbox.unheard("the time before the run's state was lost")
        for prefix, reduction, workers in pickle.loads(lost.read_bytes()):
            run.add(prefix, reduction, workers)


def _count_restart(run: Run) -> None:
    # Of a disabled run no row is on the disk.
    [(arrived,)] = run.state.db.execute("SELECT count(*) FROM rows WHERE metrics IS NULL")
    rows, facts = max(arrived, len(run.writer.logs.there)), run.state.facts
    deaths = 0 if rows > facts.get("rows_at_restart", -1) else facts["deaths"] + 1
    run.state.note(restarts=facts.get("restarts", 0) + 1, deaths=deaths, rows_at_restart=rows)
    if deaths > DEATHS:
        run.state.commit()
        run.state.close()
        raise GivenUpError(f"given up: the pipeline actor died {deaths} times without a row in between")


def _end_earlier(run: Run) -> None:
    """Makes rows of all that is left of an earlier run, whose process did not finish it. This one goes on with them."""
    _read_what_is_left(run, time.monotonic() + 10)
    run.state.do("DELETE FROM outboxes")
    run.state.note(owner_end=None)
    run.state.commit()
    shutil.rmtree(run.address.folder, ignore_errors=True)


def _read_what_is_left(run: Run, deadline: float) -> None:
    run.read_to_end(deadline)
    for place in run.inbox.places:
        run.inbox.place_is_gone(place, "what was logged there at last")
    run.end(run.pipelines, deadline)


def recover(folder: Path, wait: bool = False) -> Ledgers:
    """Finishes a run, unless its actor does. wait: for the actor, as long as it lives.

    Raises OSError where that is not possible.
    """
    letter = read_letter(folder)
    state = _open_state(letter, wait)
    if state:
        move_in(letter)
        run = Run(state, letter.init, letter.address, letter.process, threading.RLock())
        if not state.is_finished:
            _finish(run)
        write_ledgers(folder, state.facts["ledgers"])
        state.remove()
    ledgers = read_ledgers(folder)
    clean(letter)
    return ledgers


def _open_state(letter: Letter, wait: bool) -> State | None:
    """None if the run has been finished meanwhile."""
    path = state_path(Path(letter.init["dir"], "wandb"), letter.init["id"])
    while not (letter.address.folder / LEDGERS).exists():
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        try:
            state = State(path, patience=0.1)
        except OSError:
            if not wait:
                raise
            time.sleep(0.1)
            continue
        address = state.facts.get("address")
        if address and address.nonce == letter.address.nonce:
            return state
        if not address:
            state.remove()
            continue
        state.close()
        raise OSError(f"{path} is that of a later run of this id")
    return None


def _finish(run: Run) -> None:
    run.state.note(tried_again=True)  # nobody would start this process again
    run.state.warn("recovered", "the pipeline actor is gone; the run was finished without it")
    _read_what_is_left(run, time.monotonic() + 60)
    run.start()
    exit_code, failure = run.state.facts.get("end") or run.inbox.owner_end or GONE
    run.finish(exit_code, failure, time.monotonic() + (run.writer.timeout or float("inf")))


def write_ledgers(folder: Path, ledgers: Ledgers) -> None:
    """Says that the run is finished, for whoever needs to know."""
    with contextlib.suppress(OSError):
        write_private(folder / LEDGERS, pickle.dumps(ledgers))


def read_ledgers(folder: Path) -> Ledgers:
    return pickle.loads((folder / LEDGERS).read_bytes())


def clean(letter: Letter) -> None:
    """Removes the private folder, if the owner does not do that."""
    if not is_alive(letter.address.folder, letter.process):
        shutil.rmtree(letter.address.folder, ignore_errors=True)


def start(folder: Path, orphan: bool = False) -> subprocess.Popen:
    """Recovers a run, as soon as its actor has ended, in a process that no signal for this one reaches.

    orphan: it is no child of this process, because Ray kills an actor's children with it.
    """
    root = Path(__file__).resolve().parents[len(__name__.split(".")) - 1]  # the folder that `backbone` is in
    command = [sys.executable, "-m", __name__, "--wait", str(folder)]
    return subprocess.Popen(
        ["sh", "-c", '"$@" &', "sh", *command] if orphan else command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if orphan else subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},  # a config's classes
        start_new_session=True,
    )


def abandoned() -> list[Path]:
    """The private folders on this node whose runs nobody finishes any more."""
    found = []
    for folder in Path(tempfile.gettempdir()).glob("wandb-run-*"):
        with contextlib.suppress(OSError):
            if not is_alive(folder, read_letter(folder).process):
                found.append(folder)
    return found


def main(arguments: list[str]) -> int:
    wait, folders = "--wait" in arguments, [Path(argument) for argument in arguments if argument != "--wait"]
    status = 0
    for folder in folders or abandoned():
        try:
            for ledger in recover(folder, wait).values():
                print(ledger, flush=True)
        except OSError as error:
            status = 1
            print(f"{folder}: {line(error)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
