"""Finishes runs whose pipeline actor is gone, from what it has left on this node.

    python -m backbone.recover [FOLDER …]

A FOLDER is a run's private one, `wandb-run-…` in the temporary folder. Without arguments these are all whose owner is
dead, and whose state no process has. The run's owner calls this as well, and so does an actor that may be killed before
it is through. It joins no Ray, so what workers logged on other nodes, and no relay has brought, is not read but named.
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

from .files import LEDGERS, Letter, is_private_folder, move_in, read_letter, state_path, write_private
from .inbox import GONE
from .ledger import Ledgers, line
from .page import is_alive
from .run import Run
from .state import State
from .takeover import read_what_is_left


def recover(folder: Path, wait: bool = False) -> Ledgers:
    """Finishes a run, unless its actor does. wait: for the actor, as long as it lives.

    Raises OSError where that is not possible.
    """
    letter = read_letter(folder)
    if state := _open_state(letter, wait):
        move_in(letter)
        run = Run(state, letter.init, letter.address, letter.process, threading.RLock())
        if not state.is_finished:
            _finish(run)
        ledgers = state.facts["ledgers"]
        write_ledgers(folder, ledgers)
        if earlier := state.facts.get("earlier"):  # whose rows these are, too
            shutil.rmtree(earlier["address"].folder, ignore_errors=True)
        state.remove()
    else:
        ledgers = read_ledgers(folder)
    clean(letter)
    return ledgers


def _open_state(letter: Letter, wait: bool) -> State | None:
    """None if the run has been finished meanwhile."""
    folder, init = letter.address.folder, letter.init
    path = state_path(Path(init["dir"], "wandb"), init["project"], init["id"], folder.parent)
    while not (folder / LEDGERS).exists():
        if not path.exists():
            if (folder / "pipelines").exists() and not (folder / LEDGERS).exists():
                raise FileNotFoundError(f"{path} is gone")
            return None  # the run had not begun, or another process has just finished it
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
    read_what_is_left(run, time.monotonic() + 60)
    run.start()
    exit_code, failure = run.state.facts.get("end") or run.state.facts.get("owner_end") or GONE
    run.finish(exit_code, failure, time.monotonic() + run.writer.timeout)


def write_ledgers(folder: Path, ledgers: Ledgers) -> None:
    """Says that the run is finished, for whoever needs to know."""
    with contextlib.suppress(OSError):
        write_private(folder / LEDGERS, pickle.dumps(ledgers))


def read_ledgers(folder: Path) -> Ledgers:
    """None of a run that had not begun."""
    return pickle.loads((folder / LEDGERS).read_bytes()) if (folder / LEDGERS).exists() else {}


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


def reason(stderr: bytes, folder: Path) -> str:
    """Why this could not finish the run of a folder. Other libraries may have written to stderr after it."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    reasons = [each for each in lines if each.startswith(f"{folder}: ")] or lines
    return reasons[-1] if reasons else ""


def abandoned() -> list[Path]:
    """The private folders on this node whose runs nobody finishes any more."""
    return [*filter(_is_abandoned, Path(tempfile.gettempdir()).glob("wandb-run-*"))]


def _is_abandoned(folder: Path) -> bool:
    try:
        return is_private_folder(folder) and not is_alive(folder, read_letter(folder).process)
    except FileNotFoundError:  # it belongs to a run of another node, or has just been removed
        return False
    except OSError:  # `recover` says what is wrong with it
        return True


def main(arguments: list[str]) -> int:
    wait = "--wait" in arguments  # and absolute, because the run's own directory becomes this process's
    given = [Path(argument).absolute() for argument in arguments if argument != "--wait"]
    folders = given or abandoned()
    if len(folders) > 1:  # each in a process of its own: where a wandb-core dies, only a new process gets a new one
        command = [sys.executable, "-m", __spec__.name]
        left = (folder for folder in folders if given or folder.exists())  # another call may be at it, too
        codes = [subprocess.run([*command, str(folder)]).returncode for folder in left]
        return int(any(codes))
    for folder in folders:
        try:
            for ledger in recover(folder, wait).values():
                print(ledger, flush=True)
        except Exception as error:
            print(f"{folder}: {line(error)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
