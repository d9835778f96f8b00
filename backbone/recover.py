"""Finishes runs whose pipeline actor is gone, from what it has left on this node.

    python -m backbone.recover [FOLDER …]

A FOLDER is a run's private one, `wandb-run-…` in the temporary folder. Without arguments these are all whose owner is
dead, and whose state no process has. The run's owner calls this as well, and so does an actor that may be killed before
it is through. It joins no Ray, so what workers logged on other nodes, and no relay has brought, is not read but named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .files import state_path, write_private
from .inbox import GONE
from .ledger import Ledger, Ledgers, line
from .letter import Letter, move_in, read_letter
from .page import lives
from .run import Run
from .state import State

logger = logging.getLogger("wandb_run")
LEDGERS = "ledgers"  # a file in the private folder, when the run is finished


def recover(folder: Path, wait: bool = False) -> Ledgers:
    """Finishes a run, unless its actor does. wait: for the actor, as long as it lives.

    Raises OSError where that is not possible.
    """
    letter = read_letter(folder)
    state = _open_state(letter, wait)
    if state:
        move_in(letter)
        run = Run(state, letter.init, letter.address, letter.process, threading.RLock())
        if "ledgers" not in state.facts:
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
        with contextlib.suppress(*([OSError] if wait else [])):
            state = State(path, patience=0.1)
            address = state.facts.get("address")
            if not address:
                state.remove()
            elif address.nonce != letter.address.nonce:
                state.close()
                raise OSError(f"{path} is that of a later run of this id")
            else:
                return state
    return None


def _finish(run: Run) -> None:
    minute = time.monotonic() + 60
    run.state.note(tried_again=True)  # this process could not be followed by another one
    run.state.warn("recovered", "the pipeline actor is gone; the run was finished without it")
    run.read_to_end(minute)
    for place in run.inbox.places:
        run.inbox.place_is_gone(place, "what was logged there at last")
    run.end(run.pipelines, minute)
    run.start()
    exit_code, failure = run.inbox.owner_end or GONE
    run.finish(exit_code, failure, time.monotonic() + (run.writer.timeout or float("inf")))


def write_ledgers(folder: Path, ledgers: Ledgers) -> None:
    """Says that the run is finished, for whoever needs to know."""
    with contextlib.suppress(OSError):
        write_private(folder / LEDGERS, pickle.dumps(ledgers))


def read_ledgers(folder: Path) -> Ledgers:
    return pickle.loads((folder / LEDGERS).read_bytes())


def clean(letter: Letter) -> None:
    """Removes the private folder, if the owner does not do that."""
    if not lives(letter.address.folder, letter.process):
        shutil.rmtree(letter.address.folder, ignore_errors=True)


def start(folder: Path, orphan: bool = False) -> subprocess.Popen:
    """Recovers a run, as soon as its actor has ended, in a process that no signal for this one reaches.

    orphan: it is no child of this process, because Ray kills an actor's children with it.
    """
    root = Path(__file__).resolve().parents[len(__name__.split(".")) - 1]
    command = [sys.executable, "-m", __name__, "--wait", str(folder)]
    return subprocess.Popen(
        ["sh", "-c", '"$@" &', "sh", *command] if orphan else command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if orphan else subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},  # a config's classes
        start_new_session=True,
    )


def finish_without_actor(letter: Letter, why: Exception, begun: Ledger, prefixes: Sequence[str]) -> Ledgers:
    """Has a run of this process finished whose actor can't be reached. Its exit code is in the outbox by now.

    begun: how the run began, for the ledgers if that fails.
    """
    process, folder = start(letter.address.folder), letter.address.folder
    settings, said = letter.init["settings"], b""
    upload = float(settings.get("finish_timeout", letter.environ.get("WANDB_FINISH_TIMEOUT", 60)))
    seconds = 30 + upload if upload else None
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    if (folder / LEDGERS).exists():
        return read_ledgers(folder)
    problem = said.decode(errors="replace").strip().rpartition("\n")[2] or f"that took more than {seconds} s"
    told = [f"the pipeline actor can't be reached: {line(why)}", f"the run could not be finished: {problem}"]
    return {prefix: dataclasses.replace(begun, prefix=prefix, unheard=["all"], warnings=told) for prefix in prefixes}


def abandoned() -> list[Path]:
    """The private folders on this node whose runs nobody finishes any more."""
    found = []
    for folder in Path(tempfile.gettempdir()).glob("wandb-run-*"):
        with contextlib.suppress(OSError):
            if not lives(folder, read_letter(folder).process):
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
